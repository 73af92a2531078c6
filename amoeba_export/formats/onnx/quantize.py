"""Weight-only block quantization, as MatMulNBits reads it: one scale per block of an output row.

Blocks lie along `in` and weights come as [out, in], so that any range of rows can be done alone. A block that lies on a
grid of the encoding keeps it (`formats/grid.py`). Others are rounded to nearest: without offsets by onnxruntime's own
kernels, so that the numbers are theirs, bit for bit.

With offsets, a block is step * (integer - zero point) + offset, the form of GGUF's Q4_1. MatMulNBits takes such zero
points as floats, too, and then turns every weight into fp32 at every step: fifteen times slower on a CPU. So the zero
point is the nearest integer, and what remains is a weight of its own: of the sum of the block's inputs, which the graph
appends to the inputs (`ort.py`). One column more for 32 makes the block exact to a thirtieth of a step.

Legend: O out, I in, B blocks of a row, E blocks of offsets, S weights of a block.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from amoeba_export.formats.grid import lies_on_grid, offset_grids, symmetric_grids
from amoeba_export.formats.onnx.precision import Blockwise

_ROOM = 14.5
"""Levels that a block's values are spread over, of 15: the rest is for the error of its offset."""

_FEW = 16
"""A last block of fewer weights may be on some grid by chance, and is rounded like any other."""

_Floats = npt.NDArray[np.float32]
_Bytes = npt.NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class Quantized:
    """Some rows of a weight: packed blocks [O, B + E, blob], scales [O, B + E], and packed zero points with offsets."""

    packed: _Bytes
    scales: _Floats
    zero_points: _Bytes | None = None


def quantize_rows(w_OI: torch.Tensor, encoding: Blockwise) -> Quantized:
    """Quantize some output rows of a linear weight in fp32."""
    rows, columns = w_OI.shape
    values = np.ascontiguousarray(w_OI.numpy(), np.float32)
    padded = np.pad(values, ((0, 0), (0, -columns % encoding.block_size)))
    blocks_OBS = padded.reshape(rows, -1, encoding.block_size)
    return _with_offsets(blocks_OBS) if encoding.has_offsets else _symmetric(values, blocks_OBS, encoding)


def is_rounded(w_OI: torch.Tensor, encoding: Blockwise) -> bool:
    """Whether a matrix lies on grids that `encoding` holds."""
    encoding = encoding.for_columns(w_OI.shape[1])
    return lies_on_grid(
        w_OI.float().numpy(),
        block_size=encoding.block_size,
        bits=encoding.bits,
        has_offsets=encoding.has_offsets,
    )


@contextmanager
def _logging_as_it_is() -> Iterator[None]:
    """An import inside configures nothing: this one of onnxruntime sends every library's log to the screen."""
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    try:
        yield
    finally:
        root.handlers[:] = handlers
        root.setLevel(level)


def _symmetric(w_OI: _Floats, blocks_OBS: _Floats, encoding: Blockwise) -> Quantized:
    # Imported here: most files have no integers.
    with _logging_as_it_is():
        from onnxruntime.quantization.matmul_nbits_quantizer import (
            DefaultWeightOnlyQuantConfig,
            DefaultWeightOnlyQuantizer,
        )

    config = DefaultWeightOnlyQuantConfig(block_size=encoding.block_size, is_symmetric=True, bits=encoding.bits)
    w_IO = np.ascontiguousarray(w_OI.T)  # its kernels want it so, and only a chunk is ever turned
    packed, scales, _zero_points = DefaultWeightOnlyQuantizer(config).qbits_block_quant(w_IO)
    scales = scales.reshape(len(w_OI), -1)
    grids = symmetric_grids(blocks_OBS, encoding.bits)
    kept = grids.fits & blocks_OBS.any(-1)
    if w_OI.shape[1] % encoding.block_size < _FEW:
        kept[:, w_OI.shape[1] // encoding.block_size :] = False
    if kept.any():
        codes = np.rint(blocks_OBS[kept] / grids.steps[kept][:, None]) + 2 ** (encoding.bits - 1)
        packed[kept] = _pack(codes.astype(np.uint8), encoding.bits)
        scales[kept] = grids.steps[kept]
    return Quantized(packed, scales)


def _with_offsets(blocks_OBS: _Floats) -> Quantized:
    """Four bits, zero points and offsets."""
    rows, num_blocks, size = blocks_OBS.shape
    low_OB, high_OB = blocks_OBS.min(-1), blocks_OBS.max(-1)
    grids = offset_grids(blocks_OBS, 4)
    steps_OB = np.where(grids.fits, grids.steps, (high_OB - low_OB) / np.float32(_ROOM))
    steps_OB = np.where(high_OB > low_OB, steps_OB, np.where(low_OB == 0, 1, np.abs(low_OB) / 7)).astype(np.float32)
    zero_OB = np.clip(np.rint(-low_OB / steps_OB), 0, 15)
    offset_OES = np.zeros((rows, -(-num_blocks // size), size), np.float32)
    offset_OES.reshape(rows, -1)[:, :num_blocks] = low_OB + zero_OB * steps_OB
    offset_steps_OE = np.abs(offset_OES).max(-1) / np.float32(7)
    offset_steps_OE[offset_steps_OE == 0] = 1
    offset_codes = np.rint(offset_OES / offset_steps_OE[..., None])
    told_OB = (offset_codes * offset_steps_OE[..., None]).reshape(rows, -1)[:, :num_blocks]

    left_OBS = blocks_OBS - told_OB[..., None]
    codes = np.rint(left_OBS / steps_OB[..., None]) + zero_OB[..., None]
    beyond_OB = ((codes < 0) | (codes > 15)).any(-1)
    if beyond_OB.any():  # an offset that its neighbours left no room for: as if there were none
        left = left_OBS[beyond_OB]
        low, high = np.minimum(left.min(-1), 0), np.maximum(left.max(-1), 0)
        step = (high - low) / np.float32(15)
        zero = np.rint(-low / step)
        codes[beyond_OB] = np.clip(np.rint(left / step[:, None]) + zero[:, None], 0, 15)
        steps_OB[beyond_OB], zero_OB[beyond_OB] = step, zero
    zero_all = np.concatenate([zero_OB, np.full_like(offset_steps_OE, 8)], 1).astype(np.uint8)
    return Quantized(
        packed=np.concatenate([_pack(codes.astype(np.uint8), 4), _pack((offset_codes + 8).astype(np.uint8), 4)], 1),
        scales=np.concatenate([steps_OB, offset_steps_OE], 1),
        zero_points=_pack(np.pad(zero_all, ((0, 0), (0, zero_all.shape[1] % 2)), constant_values=8), 4),
    )


def _pack(codes: _Bytes, bits: int) -> _Bytes:
    """Codes [..., n] as MatMulNBits has them: two of 4 bits in a byte, the first one in its lower half."""
    if bits == 8:
        return codes
    return np.bitwise_or(codes[..., ::2], np.left_shift(codes[..., 1::2], 4), dtype=np.uint8)
