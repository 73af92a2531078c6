"""One way to write a file that is read again: whoever looks finds the old content or the new one, never a part."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from amoeba_export import leftovers


@contextmanager
def replacing(path: Path, *, shared: bool = False, durable: bool = True) -> Iterator[Path]:
    """A path to write to. When the block ends well, what it wrote takes the place of `path` in one rename.

    When it ends badly, `path` is as it was and nothing else is left. A device or a pipe cannot be replaced: it is
    written to as it is. A link stays, and what it points at is replaced.

    Args:
        path: The file. Its folder exists.
        shared: Several processes may write it at the same moment, so that each needs a part of its own. Without, a part
            that a killed process left is overwritten by the next one.
        durable: Have it on the disk before the rename. Not worth its time where a damaged file is noticed and made
            again.

    Raises:
        OSError: It cannot be written.
    """
    if path.exists() and not path.is_file():
        yield path
        return
    path = path.resolve()
    part = path.with_name(f".{path.name}.{os.getpid()}.part" if shared else f".{path.name}.part")
    noted = leftovers.note(lambda: part.unlink(missing_ok=True))
    try:
        yield part
        if durable:
            with part.open("rb") as file:
                os.fsync(file.fileno())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
        leftovers.forget(noted)


def replace_text(path: Path, text: str) -> None:
    """Replace `path` by `text` in UTF-8."""
    with replacing(path) as part:
        part.write_text(text, encoding="utf-8")
