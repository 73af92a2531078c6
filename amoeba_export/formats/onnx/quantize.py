"""Weight-only block quantization, as MatMulNBits reads it: one scale per block of an output row, maybe a zero point.

Blocks lie along `in` and weights come as [out, in], so that any range of rows can be done alone.

8 bits are symmetric, and their numbers are those of onnxruntime's own kernels, bit for bit, because they are its
kernels. 4 bits have a zero point and are searched for the smallest squared error. Mean KL divergence from fp32 on
SmolLM2-135M, the embedding and lm_head in 4 bits like the rest: 0.36 rounded to nearest as onnxruntime does it, 0.42
for a search like this one without zero points, 0.28 for this one. With the rounding of weights alone simulated (0.27
for this one), smaller steps than `SHRINKS` lower the squared error a little more and give 0.30; an error in which large
weights count for more gives 0.34. `SHRINKS` was chosen on that text; on another one this gives 0.31, nearest 0.39.

Legend: O out, I in, N blocks of a chunk, B weights of a block.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch.nn import functional

from amoeba_export.formats.onnx.precision import Blockwise

SHRINKS = (1.0, 0.95, 0.9, 0.85)
"""Steps that are tried, relative to the one that spans a block from its least to its greatest value."""

SHIFTS = (0, -1, 1)
"""Zero points that are tried, relative to the nearest one."""

_LEVELS = 4096
"""A block's largest value is this while it is searched, and all others are whole numbers: sums are then exact in fp32,
in whatever order a processor adds, so that every machine writes the same bytes. Good for blocks of up to 256."""

_CHUNK_BLOCKS = 2048
"""Blocks searched at once: what a processor's cache holds."""


@dataclass(frozen=True, slots=True)
class Quantized:
    """Some rows of a weight: packed blocks [O, blocks, blob], scales [O, blocks], zero points, two in a byte."""

    packed: npt.NDArray[np.uint8]
    scales: npt.NDArray[np.float32]
    zero_points: npt.NDArray[np.uint8] | None = None


def quantize_rows(w_OI: torch.Tensor, encoding: Blockwise) -> Quantized:
    """Quantize some output rows of a linear weight in fp32."""
    return _with_zero_points(w_OI, encoding) if encoding.zero_points else _symmetric(w_OI, encoding)


def _symmetric(w_OI: torch.Tensor, encoding: Blockwise) -> Quantized:
    # Imported here: only int8 needs it.
    from onnxruntime.quantization.matmul_nbits_quantizer import DefaultWeightOnlyQuantConfig, DefaultWeightOnlyQuantizer

    config = DefaultWeightOnlyQuantConfig(block_size=encoding.block_size, is_symmetric=True, bits=encoding.bits)
    w_IO = np.ascontiguousarray(w_OI.numpy().T)  # its kernels want it so, and only a chunk is ever turned
    packed, scales, _zero_points = DefaultWeightOnlyQuantizer(config).qbits_block_quant(w_IO)
    return Quantized(packed, scales.reshape(len(w_OI), -1))


def _with_zero_points(w_OI: torch.Tensor, encoding: Blockwise) -> Quantized:
    assert encoding.bits == 4, encoding
    rows, columns = w_OI.shape
    size, blocks = encoding.block_size, encoding.num_blocks(columns)
    padded = functional.pad(w_OI, (0, blocks * size - columns)) if columns % size else w_OI.contiguous()
    w_NB = padded.view(-1, size)
    codes_NB = torch.empty(w_NB.shape, dtype=torch.uint8)
    scales_N, zeros_N = torch.empty(len(w_NB)), torch.empty(len(w_NB), dtype=torch.uint8)
    for start in range(0, len(w_NB), _CHUNK_BLOCKS):
        chunk = slice(start, start + _CHUNK_BLOCKS)
        codes_BN, scales_N[chunk], zeros_N[chunk] = _search(w_NB[chunk].T.contiguous())
        codes_NB[chunk] = codes_BN.T
    return Quantized(
        packed=_pairs(codes_NB.view(rows, blocks, size)),
        scales=scales_N.view(rows, blocks).numpy(),
        zero_points=_pairs(functional.pad(zeros_N.view(rows, blocks), (0, blocks % 2))),
    )


def _search(w_BN: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes, scales and zero points of blocks: w is about (code - zero point) * scale.

    Of each step and zero point, the scale with the least squared error for the codes that they give has a closed form;
    the best of all is taken, and the codes are those nearest to the weights under it.
    """
    peak_N = w_BN.abs().amax(0)
    peak_N[peak_N == 0] = 1.0
    whole_BN = (w_BN / peak_N * _LEVELS).round_()
    low_N, high_N = whole_BN.amin(0).clamp_(max=0), whole_BN.amax(0).clamp_(min=0)
    step_N = (high_N - low_N) / 15
    step_N[step_N == 0] = 1.0
    nearest_N = (-low_N / step_N).round_()
    best_N, scale_N, zero_N = torch.zeros_like(step_N), step_N, nearest_N
    for shrink in SHRINKS:
        steps_BN = whole_BN / (step_N * shrink)
        for shift in SHIFTS:
            shifted_N = (nearest_N + shift).clamp_(0, 15)
            codes_BN = (steps_BN + shifted_N).round_().clamp_(0, 15).sub_(shifted_N)
            product_N = (whole_BN * codes_BN).sum(0)
            square_N = codes_BN.square_().sum(0)
            # How much of the squared error this explains, with the scale product / square.
            gain_N = product_N * product_N / square_N.clamp(min=1)
            better_N = gain_N > best_N
            best_N = torch.where(better_N, gain_N, best_N)
            scale_N = torch.where(better_N, product_N / square_N, scale_N)
            zero_N = torch.where(better_N, shifted_N, zero_N)
    codes_BN = (whole_BN / scale_N).add_(zero_N).round_().clamp_(0, 15)
    return codes_BN.to(torch.uint8), scale_N * peak_N / _LEVELS, zero_N.to(torch.uint8)


def _pairs(codes: torch.Tensor) -> npt.NDArray[np.uint8]:
    """Codes of 4 bits, two in a byte along the last axis, the first in the lower half."""
    pairs: npt.NDArray[np.uint8] = (codes[..., ::2] | (codes[..., 1::2] << 4)).numpy()
    return pairs
