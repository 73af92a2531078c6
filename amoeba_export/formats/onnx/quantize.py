"""Weight-only block quantization, as MatMulNBits reads it: symmetric, one scale per block of an output row.

The numbers are those of onnxruntime's own kernels, bit for bit, because they are its kernels. They want [in, out] and
we have [out, in]: blocks lie along `in`, so any range of rows can be done alone, and only a chunk is ever turned.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from amoeba_export.formats.onnx.precision import Blockwise


def quantize_rows(
    w_OI: npt.NDArray[np.float32], encoding: Blockwise
) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.float32]]:
    """Quantize some output rows of a linear weight.

    Returns:
        The packed blocks [O, blocks, blob] and their scales [O, blocks].
    """
    # Imported here: fp32 and fp16 models do without onnxruntime.
    from onnxruntime.quantization.matmul_nbits_quantizer import DefaultWeightOnlyQuantConfig, DefaultWeightOnlyQuantizer

    config = DefaultWeightOnlyQuantConfig(block_size=encoding.block_size, is_symmetric=True, bits=encoding.bits)
    packed, scales, _zero_points = DefaultWeightOnlyQuantizer(config).qbits_block_quant(np.ascontiguousarray(w_OI.T))
    return packed, scales.reshape(len(w_OI), -1)
