"""What each `--dtype` means inside an ONNX file."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from amoeba_export.formats.onnx.datatype import DataType


@dataclass(frozen=True, slots=True)
class Blockwise:
    """Integers with one scale per block along the input axis.

    Attributes:
        block_size: Weights that share one scale: a power of two from 16 on.
        zero_points: Each block says which integer is zero. Without, it is the middle one.
    """

    bits: int
    block_size: int
    zero_points: bool = False

    def num_blocks(self, columns: int) -> int:
        """Blocks along an input axis of `columns`; the last one may be padded."""
        return -(-columns // self.block_size)

    def zero_point_bytes(self, columns: int) -> int:
        """Bytes of the packed zero points of one row."""
        return -(-self.num_blocks(columns) * self.bits // 8)

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
    """

    activation: DataType
    linear: Blockwise | None = None
    head: Blockwise | None = None


_INT4 = Blockwise(4, 32, zero_points=True)

PRECISIONS = {
    "fp32": Precision(activation=DataType.FLOAT),
    "fp16": Precision(activation=DataType.FLOAT16),
    "bf16": Precision(activation=DataType.BFLOAT16),
    "int8": Precision(activation=DataType.FLOAT, linear=Blockwise(8, 64), head=Blockwise(8, 64)),
    "int4": Precision(activation=DataType.FLOAT, linear=_INT4, head=_INT4),
}

TORCH_DTYPES = {
    DataType.FLOAT: torch.float32,
    DataType.FLOAT16: torch.float16,
    DataType.BFLOAT16: torch.bfloat16,
}

LOWEST = float(torch.finfo(torch.float32).min)
"""Added to the score of a key that must not be seen. Finite, so that a row that sees nothing is not NaN."""
