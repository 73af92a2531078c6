"""Where amoeba finds the data it ships and keeps what it can make again."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path

from amoeba_export.errors import CacheUnusable, NotUtf8, refused_with

_UNUSABLE = (
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO),
    *(errno.EROFS, errno.EACCES, errno.EPERM),
    *(errno.EEXIST, errno.ENOTDIR, errno.ENAMETOOLONG, errno.ELOOP),
)

OCCUPIED = ".occupied"
"""A file in a folder of the cache: whoever works inside for long holds a shared lock on it, and it is not pruned."""

_PACKAGE = Path(__file__).resolve().parent


def data_dir(kind: str) -> Path:
    """The folder of shipped data called `kind` (`targets`, `calibration`).

    In a wheel it lies under `amoeba_export/_data/`; in an editable install it is the folder at the repository root.
    """
    packaged = _PACKAGE / "_data" / kind
    return packaged if packaged.is_dir() else _PACKAGE.parent / kind


def cache_dir() -> Path:
    """The cache root: `$AMOEBA_CACHE`, else `$XDG_CACHE_HOME/amoeba`, else `~/.cache/amoeba`. Not created here."""
    if explicit := os.environ.get("AMOEBA_CACHE"):
        return Path(explicit).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "amoeba"


def require_utf8(path: Path) -> None:
    """Raise `NotUtf8` for a path that the libraries which read and write weights cannot open."""
    try:
        os.fsencode(path.absolute()).decode()
    except UnicodeDecodeError:
        raise NotUtf8(path) from None


@contextlib.contextmanager
def writing_cache(root: Path) -> Iterator[None]:
    """Around what writes below `root`, the cache: what the system refuses there becomes `CacheUnusable`."""
    try:
        yield
    except Exception as error:
        number, filename = refused_with(error), getattr(error, "filename", None)
        elsewhere = isinstance(filename, str) and not Path(filename).is_relative_to(root)
        if number not in _UNUSABLE or (elsewhere and not root.is_relative_to(str(filename))):
            raise
        raise CacheUnusable(root, os.strerror(number)) from error
