"""The external data file `model.onnx.data`: where each tensor lies, known before the first weight arrives.

Offsets are computed up front, so weights can come in any order and go straight to their place. Rows of one stored
matrix may come from several weights (packed q, k and v): all matrices are stored [out, in] as checkpoints have them, so
that a packed matrix is its parts one after the other and nothing waits in memory.
"""

from __future__ import annotations

import errno
import math
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from amoeba_export.errors import DiskFull
from amoeba_export.formats.onnx.datatype import DataType

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
    """The open file, at its full size from the start.

    Raises:
        DiskFull: `size_bytes` do not fit on the disk of `path`; or, from `write`, no longer do.
    """

    def __init__(self, path: Path, size_bytes: int) -> None:
        self._path = path
        self._size_bytes = size_bytes
        free_bytes = shutil.disk_usage(path.parent).free
        if size_bytes > free_bytes:
            raise DiskFull(path.parent, size_bytes, free_bytes)
        self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        try:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(self._descriptor, 0, size_bytes)
            else:
                os.ftruncate(self._descriptor, size_bytes)
        except OSError as error:
            self.close()
            raise self._explained(error) from error

    def write(self, region: Region, row_start: int, rows: npt.NDArray[Any]) -> None:
        """Write `rows` of `region` from `row_start` on; they are raw bytes or of the region's dtype."""
        view = np.ascontiguousarray(rows).reshape(-1).view(np.uint8).data
        offset = region.offset + row_start * region.row_bytes
        assert offset + len(view) <= region.offset + region.size_bytes, region
        try:
            while view:
                written = os.pwrite(self._descriptor, view, offset)
                view, offset = view[written:], offset + written
        except OSError as error:
            raise self._explained(error) from error

    def close(self) -> None:
        """Close the file. Making it durable is the staging folder's business."""
        os.close(self._descriptor)

    def _explained(self, error: OSError) -> Exception:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            return DiskFull(self._path.parent, self._size_bytes, shutil.disk_usage(self._path.parent).free)
        return error
