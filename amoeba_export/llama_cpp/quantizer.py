"""llama.cpp's own rounding of K-quants, called in the library that the xllamacpp wheel carries.

The search for scales in a super-block is some hundred lines of C that change with llama.cpp: calling them gives the
bytes that its tools give. It is a pure function of rows, so nothing of the rest of the library is started.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

SYMBOL = "ggml_quantize_chunk"

LEAST_ROWS = 64
"""Rows that are worth a thread."""


def has_quantizer() -> bool:
    """Whether the wheel is installed and its library has the function. Loads it."""
    return _library() is not None


def quantize_rows(
    rows_OI: npt.NDArray[np.float32],
    kind: int,
    block: tuple[int, int],
    *,
    importance_I: npt.NDArray[np.float32] | None = None,
) -> npt.NDArray[np.uint8]:
    """Rows of a matrix in one of ggml's types.

    Args:
        rows_OI: In fp32; whole blocks each, and finite.
        kind: The number of the type (`gguf.GGMLQuantizationType`).
        block: Values of a block, and its bytes.
        importance_I: Mean square of each input, by which errors are weighed; None: by the values themselves.

    Returns:
        Bytes [O, bytes of a row].
    """
    library = _library()
    assert library is not None, "has_quantizer() was not asked"
    num_rows, num_columns = rows_OI.shape
    values, size = block
    assert num_columns % values == 0
    rows_OI = np.ascontiguousarray(rows_OI, dtype=np.float32)
    packed = np.empty((num_rows, num_columns // values * size), dtype=np.uint8)
    weights = None
    if importance_I is not None:
        importance_I = np.ascontiguousarray(importance_I, dtype=np.float32)
        assert importance_I.shape == (num_columns,)
        weights = importance_I.ctypes.data_as(ctypes.POINTER(ctypes.c_float))

    def convert(first: int, count: int) -> None:
        source = rows_OI[first : first + count].ctypes.data_as(ctypes.POINTER(ctypes.c_float))
        target = packed[first : first + count].ctypes.data_as(ctypes.c_void_p)
        written = library.ggml_quantize_chunk(kind, source, target, 0, count, num_columns, weights)
        assert written == count * packed.shape[1], (kind, written)

    parts = list(_parts(num_rows))
    if len(parts) == 1:
        convert(*parts[0])
    else:  # ctypes lets go of the interpreter's lock, and rows know nothing of each other
        with ThreadPoolExecutor(len(parts)) as pool:
            list(pool.map(lambda part: convert(*part), parts))
    return packed


def _parts(num_rows: int) -> Iterable[tuple[int, int]]:
    count = max(1, min(os.cpu_count() or 1, num_rows // LEAST_ROWS))
    step = -(-num_rows // count)
    return ((first, min(step, num_rows - first)) for first in range(0, num_rows, step))


@cache
def _library() -> Any:
    """The wheel's library with the function's types set, or None. The Python module in it is not initialized."""
    spec = importlib.util.find_spec("xllamacpp")
    if spec is None or spec.origin is None:
        return None
    for path in sorted(Path(spec.origin).parent.glob("xllamacpp*")):
        if path.suffix not in (".so", ".pyd"):
            continue
        try:
            library = ctypes.CDLL(str(path))
            function = getattr(library, SYMBOL)
        except (OSError, AttributeError):  # a wheel for another system, or one that hides the function
            continue
        floats = ctypes.POINTER(ctypes.c_float)
        whole = ctypes.c_int64
        function.argtypes = [ctypes.c_int, floats, ctypes.c_void_p, whole, whole, whole, floats]
        function.restype = ctypes.c_size_t
        return library
    return None
