"""Weight-only block quantization, as MatMulNBits reads it: one scale per block of an output row.

Blocks lie along `in` and weights come as [out, in], so that any range of rows can be done alone. The numbers are those
of onnxruntime's own kernels, bit for bit, because they are its kernels: rounded to nearest, without zero points.

Other ways to use 4 bits were tried on SmolLM2-135M. Mean KL divergence from fp32, with nothing equalized: 0.36 for this
one (`python -m benchmarks.equalize`) and, by hand, 0.28 with zero points and a search for the least squared error, 0.40
for such a search without zero points, 0.28 and 0.26 with 8 bits in v and in all of q, k and v. Zero points and 8 bits
cost 7 to 10 % of a decode on a CPU with AVX2 alone; `formats/equalize.py` gains as much and costs nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from amoeba_export.formats.onnx.precision import Blockwise


@dataclass(frozen=True, slots=True)
class Quantized:
    """Some rows of a weight: packed blocks [O, blocks, blob] and scales [O, blocks]."""

    packed: npt.NDArray[np.uint8]
    scales: npt.NDArray[np.float32]


def quantize_rows(w_OI: torch.Tensor, encoding: Blockwise) -> Quantized:
    """Quantize some output rows of a linear weight in fp32."""
    # Imported here: most files have no integers.
    from onnxruntime.quantization.matmul_nbits_quantizer import DefaultWeightOnlyQuantConfig, DefaultWeightOnlyQuantizer

    config = DefaultWeightOnlyQuantConfig(block_size=encoding.block_size, is_symmetric=True, bits=encoding.bits)
    w_IO = np.ascontiguousarray(w_OI.numpy().T)  # its kernels want it so, and only a chunk is ever turned
    packed, scales, _zero_points = DefaultWeightOnlyQuantizer(config).qbits_block_quant(w_IO)
    return Quantized(packed, scales.reshape(len(w_OI), -1))
