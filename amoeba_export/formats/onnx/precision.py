"""What each `--dtype` means inside an ONNX file."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from amoeba_export.formats.onnx.datatype import DataType


@dataclass(frozen=True, slots=True)
class Blockwise:
    """Integers with one scale per block along the input axis.

    Attributes:
        block_size: Weights that share one scale: a power of two from 16 on. Zero is the integer in the middle.
    """

    bits: int
    block_size: int

    def num_blocks(self, columns: int) -> int:
        """Blocks along an input axis of `columns`; the last one may be padded."""
        return -(-columns // self.block_size)

    @property
    def blob_bytes(self) -> int:
        """Bytes of one packed block."""
        return self.block_size * self.bits // 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Precision:
    """Types of one `--dtype`.

    Attributes:
        activation: Activations, norms, biases, KV cache, logits, and every weight that is not quantized.
        linear: The projections inside layers, or None for `activation`.
        head: The embedding and lm_head, or None for `activation`.
        equalized: Channels are made alike before: see `formats/equalize.py`.
    """

    activation: DataType
    linear: Blockwise | None = None
    head: Blockwise | None = None
    equalized: bool = False


PRECISIONS = {
    "fp32": Precision(activation=DataType.FLOAT),
    "fp16": Precision(activation=DataType.FLOAT16),
    "bf16": Precision(activation=DataType.BFLOAT16),
    "int8": Precision(activation=DataType.FLOAT, linear=Blockwise(8, 64), head=Blockwise(8, 64)),
    "int4": Precision(activation=DataType.FLOAT, linear=Blockwise(4, 32), head=Blockwise(4, 32), equalized=True),
}

TORCH_DTYPES = {
    DataType.FLOAT: torch.float32,
    DataType.FLOAT16: torch.float16,
    DataType.BFLOAT16: torch.bfloat16,
}
