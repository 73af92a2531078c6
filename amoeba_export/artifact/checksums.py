"""What a folder holds, by content."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True, kw_only=True)
class FileEntry:
    """One file of an artifact.

    Attributes:
        path: Relative to the artifact, with `/` on every system.
        size_bytes: Its size.
        sha256: Its digest.
    """

    path: str
    size_bytes: int
    sha256: str


def sha256_file(path: Path) -> str:
    """The hex digest of a file's bytes, read in blocks."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def walk_files(folder: Path) -> Iterator[Path]:
    """Every regular file below `folder`, in the order of its relative path."""
    return iter(sorted((path for path in folder.rglob("*") if path.is_file()), key=lambda path: relative(path, folder)))


def relative(path: Path, folder: Path) -> str:
    """`path` below `folder`, with `/` on every system."""
    return path.relative_to(folder).as_posix()


def file_entry(path: Path, folder: Path) -> FileEntry:
    """Size and digest of a file below `folder`."""
    return FileEntry(path=relative(path, folder), size_bytes=path.stat().st_size, sha256=sha256_file(path))


def list_files(folder: Path) -> tuple[FileEntry, ...]:
    """Size and digest of every file below `folder`, sorted by path."""
    return tuple(file_entry(path, folder) for path in walk_files(folder))
