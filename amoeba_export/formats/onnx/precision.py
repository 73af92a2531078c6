"""What each `--dtype` means inside an ONNX file."""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir
import torch

BLOCK_SIZE = 32
"""Weights that share one scale. 32 is the smallest block that every kernel of MatMulNBits takes at full speed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Precision:
    """Types of one `--dtype`.

    Attributes:
        activation: Activations, norms, biases, KV cache, logits, and every weight that is not quantized.
        linear_bits: Bits of the projections inside layers, or None for `activation`.
        head_bits: Bits of the embedding and of lm_head, or None for `activation`. Four bits there ruin a small model.
    """

    activation: ir.DataType
    linear_bits: int | None = None
    head_bits: int | None = None


PRECISIONS = {
    "fp32": Precision(activation=ir.DataType.FLOAT),
    "fp16": Precision(activation=ir.DataType.FLOAT16),
    "bf16": Precision(activation=ir.DataType.BFLOAT16),
    "int8": Precision(activation=ir.DataType.FLOAT, linear_bits=8, head_bits=8),
    "int4": Precision(activation=ir.DataType.FLOAT, linear_bits=4, head_bits=8),
}

TORCH_DTYPES = {
    ir.DataType.FLOAT: torch.float32,
    ir.DataType.FLOAT16: torch.float16,
    ir.DataType.BFLOAT16: torch.bfloat16,
}

LOWEST = {
    ir.DataType.FLOAT: float(torch.finfo(torch.float32).min),
    ir.DataType.FLOAT16: float(torch.finfo(torch.float16).min),
    ir.DataType.BFLOAT16: float(torch.finfo(torch.bfloat16).min),
}
"""Added to the score of a key that must not be seen. Finite, so that a row that sees nothing is not NaN."""
