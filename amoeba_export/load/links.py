"""Links in the folder of a model or adapter.

What lies beside the weights is published with every subnet: a link out of the folder would publish a file of whoever
runs amoeba, under a name that the folder's author chose.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from amoeba_export.errors import LinkOutside

_FOLDERS_READ = ("additional_chat_templates",)


def refuse_links_outside(folder: Path) -> None:
    """Check every file of a folder that could be read. The folder itself may be reached through links.

    A snapshot of the hub's cache may link to the blobs of its own repository.

    Raises:
        LinkOutside: A file is a link to something outside.
    """
    inside = tuple(_own_trees(folder.resolve()))
    for path in _files(folder):
        real = path.resolve()
        if not any(real.is_relative_to(tree) for tree in inside):
            raise LinkOutside(folder, path.relative_to(folder), real)


def _files(folder: Path) -> Iterator[Path]:
    for path in sorted(folder.iterdir()):
        if path.is_file():
            yield path
        elif path.name in _FOLDERS_READ:
            yield from (below for below in sorted(path.rglob("*")) if below.is_file())


def _own_trees(folder: Path) -> Iterator[Path]:
    yield folder
    repository = folder.parent.parent
    if folder.parent.name == "snapshots" and repository.name.startswith("models--"):
        yield repository / "blobs"
