"""The element types that our graphs use, under ONNX's names and numbers (`TensorProto.DataType`)."""

from __future__ import annotations

import enum

import numpy as np
import numpy.typing as npt


class DataType(enum.IntEnum):
    """A type of tensor elements."""

    FLOAT = 1
    UINT8 = 2
    INT32 = 6
    INT64 = 7
    BOOL = 9
    FLOAT16 = 10
    BFLOAT16 = 16

    @property
    def bitwidth(self) -> int:
        """Bits of one element."""
        return 8 * self.numpy().itemsize

    def numpy(self) -> np.dtype[np.generic]:
        """The numpy type of the same bytes."""
        if self is DataType.BFLOAT16:
            import ml_dtypes

            brain: np.dtype[np.generic] = np.dtype(ml_dtypes.bfloat16)
            return brain
        return np.dtype(_NUMPY[self])


_NUMPY: dict[DataType, npt.DTypeLike] = {
    DataType.FLOAT: np.float32,
    DataType.UINT8: np.uint8,
    DataType.INT32: np.int32,
    DataType.INT64: np.int64,
    DataType.BOOL: np.bool_,
    DataType.FLOAT16: np.float16,
}
