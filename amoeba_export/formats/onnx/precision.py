"""What each `--dtype` means inside an ONNX file."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from amoeba_export.formats.onnx.datatype import DataType
from amoeba_export.ir.dtype import DTYPES, FLOATS


@dataclass(frozen=True, slots=True)
class Blockwise:
    """Integers with one scale per block along the input axis.

    Attributes:
        block_size: Weights that share one scale: a power of two from 16 on.
        has_offsets: Each block has a zero point and an offset, see `quantize.py`. Without, zero is the integer in the
            middle.
    """

    bits: int
    block_size: int
    has_offsets: bool = False

    def num_blocks(self, columns: int) -> int:
        """Blocks of weights along an input axis of `columns`; the last one may be padded."""
        return -(-columns // self.block_size)

    def num_stored_blocks(self, columns: int) -> int:
        """The same with those of the offsets, which follow: one more column for each block."""
        blocks = self.num_blocks(columns)
        return blocks + self.num_blocks(blocks) if self.has_offsets else blocks

    def zero_point_bytes(self, columns: int) -> int:
        """Of one row: two zero points a byte."""
        return -(-self.num_stored_blocks(columns) // 2) if self.has_offsets else 0

    def for_columns(self, columns: int) -> Blockwise:
        """The same without offsets where a block would be weights and offsets at once."""
        return dataclasses.replace(self, has_offsets=False) if columns % self.block_size else self

    @property
    def blob_bytes(self) -> int:
        """Bytes of one packed block."""
        return self.block_size * self.bits // 8

    def dividing(self, columns: int) -> Blockwise | None:
        """The same with the widest block that divides a row, since a gather takes no other; None where none does."""
        for block_size in (64, 32, 16):
            if block_size <= self.block_size and columns % block_size == 0:
                return dataclasses.replace(self, block_size=block_size)
        return None


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

    def head_of(self, columns: int) -> Blockwise | None:
        """How an embedding or lm_head with such rows is stored; None for `activation`."""
        return self.head.dividing(columns) if self.head else None

    def matrix_bytes(self, rows: int, columns: int, encoding: Blockwise | None) -> int:
        """What a matrix occupies, scales included."""
        number = self.activation.bitwidth // 8
        if encoding is None:
            return rows * columns * number
        encoding = encoding.for_columns(columns)
        blocks = encoding.num_stored_blocks(columns)
        return rows * (blocks * (encoding.blob_bytes + number) + encoding.zero_point_bytes(columns))


PRECISIONS = {
    "fp32": Precision(activation=DataType.FLOAT),
    "fp16": Precision(activation=DataType.FLOAT16),
    "bf16": Precision(activation=DataType.BFLOAT16),
    "int8": Precision(activation=DataType.FLOAT, linear=Blockwise(8, 64), head=Blockwise(8, 32)),
    "int4-mixed": Precision(
        activation=DataType.FLOAT, linear=Blockwise(4, 32, has_offsets=True), head=Blockwise(8, 32)
    ),
    "int4": Precision(activation=DataType.FLOAT, linear=Blockwise(4, 32), head=Blockwise(4, 32)),
}

TORCH_DTYPES = {PRECISIONS[name].activation: DTYPES[name].torch_dtype for name in FLOATS}
