"""The external data file `model.onnx.data`: where each tensor lies, known before the first weight arrives.

Offsets are computed up front, so weights can come in any order and go straight to their place. Rows of one stored
matrix may come from several weights (packed q, k and v): all matrices are stored [out, in] as checkpoints have them, so
that a packed matrix is its parts one after the other and nothing waits in memory.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from amoeba_export.formats.onnx.datatype import DataType
from amoeba_export.reserved_file import ReservedFile

DATA_NAME = "model.onnx.data"

_PAGE = 4096
_CACHE_LINE = 64


@dataclass(frozen=True, slots=True)
class Region:
    """One tensor in the data file."""

    name: str
    dtype: DataType
    shape: tuple[int, ...]
    offset: int

    @property
    def row_bytes(self) -> int:
        """Bytes of one index of the first axis."""
        return math.prod(self.shape[1:]) * self.dtype.bitwidth // 8

    @property
    def size_bytes(self) -> int:
        """Bytes of the whole tensor."""
        return self.shape[0] * self.row_bytes


class Layout:
    """Gives each tensor its place, in the order of asking: same model, same file."""

    def __init__(self) -> None:
        self.size_bytes = 0
        self.regions: list[Region] = []

    def reserve(self, name: str, dtype: DataType, shape: tuple[int, ...]) -> Region:
        """The next free place. Whole pages can be mapped as they are (ONNX asks for that); small tensors just align."""
        probe = Region(name, dtype, shape, 0)
        alignment = _PAGE if probe.size_bytes >= _PAGE else _CACHE_LINE
        offset = -(-self.size_bytes // alignment) * alignment
        self.size_bytes = offset + probe.size_bytes
        region = Region(name, dtype, shape, offset)
        self.regions.append(region)
        return region


class DataFile:
    """The open file, at its full size from the start, written region by region. Raises as `ReservedFile`."""

    def __init__(self, path: Path, size_bytes: int) -> None:
        self._file = ReservedFile(path, size_bytes)

    def write(self, region: Region, row_start: int, rows: npt.NDArray[Any]) -> None:
        """Write `rows` of `region` from `row_start` on; they are raw bytes or of the region's dtype."""
        view = np.ascontiguousarray(rows).reshape(-1).view(np.uint8).data
        offset = region.offset + row_start * region.row_bytes
        assert offset + len(view) <= region.offset + region.size_bytes, region
        self._file.write(view, offset)

    def close(self) -> None:
        """Close the file, unsynced."""
        self._file.close()
