"""Files whose size is known before the first byte: the space is reserved, then parts are written in any order."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path

from amoeba_export.errors import DiskFull


class ReservedFile:
    """A new file at its full size, zeros where nothing was written.

    Raises:
        DiskFull: `size_bytes` do not fit on the disk of `path`; or, from `write`, no longer do.
    """

    def __init__(self, path: Path, size_bytes: int) -> None:
        self._path = path
        self._size_bytes = size_bytes
        check_space(path.parent, size_bytes)
        self._file = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
        try:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(self._file, 0, size_bytes)
            else:
                os.ftruncate(self._file, size_bytes)
        except OSError as error:
            self.close()
            raise self._explained(error) from error

    def write(self, data: memoryview | bytes, offset: int) -> None:
        """Write bytes at `offset`."""
        view = memoryview(data)
        assert offset + len(view) <= self._size_bytes, (self._path, offset, len(view))
        try:
            while view:
                written = os.pwrite(self._file, view, offset)
                view, offset = view[written:], offset + written
        except OSError as error:
            raise self._explained(error) from error

    def close(self) -> None:
        """Close the file. Making it durable is the caller's business."""
        os.close(self._file)

    def _explained(self, error: OSError) -> Exception:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            return DiskFull(self._path.parent, self._size_bytes, shutil.disk_usage(self._path.parent).free)
        return error


def check_space(folder: Path, size_bytes: int) -> None:
    """Raise `DiskFull` where `size_bytes` do not fit on the disk of `folder`."""
    if (free := shutil.disk_usage(folder).free) < size_bytes:
        raise DiskFull(folder, size_bytes, free)
