"""Where amoeba finds the data it ships and keeps what it can make again."""

from __future__ import annotations

import os
from pathlib import Path

from amoeba_export.errors import NotUtf8

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
