"""Files that tell whether they are still what was written: their sha256 lies with them, and is checked by who reads."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path

from amoeba_export.replacing import replacing

SEAL_NAME = "seal.json"
"""sha256 of every other file of an entry."""

_HEX = 64


def seal_folder(folder: Path) -> None:
    """Write the seal of everything in `folder`."""
    digests = {name: file_digest(path) for name, path in _files(folder).items()}
    (folder / SEAL_NAME).write_text(json.dumps(digests, indent=0), encoding="utf-8")


def is_sound(folder: Path, digest_of: Callable[[Path], str]) -> bool:
    """Whether `folder` holds the files of its seal, and no others, each with the same content."""
    try:
        digests = json.loads((folder / SEAL_NAME).read_text(encoding="utf-8"))
        present = _files(folder)
        return (
            isinstance(digests, Mapping)
            and digests.keys() == present.keys()
            and all(digest_of(path) == digests[name] for name, path in present.items())
        )
    except (OSError, ValueError):
        return False


def write_sealed(path: Path, content: bytes) -> None:
    """Write `content` below its sha256, in one rename."""
    with replacing(path, shared=True, durable=False) as part:
        part.write_bytes(f"{hashlib.sha256(content).hexdigest()}\n".encode() + content)


def read_sealed(path: Path) -> bytes | None:
    """What `write_sealed` wrote. None when it is not there, or not what was written."""
    try:
        digest, _, content = path.read_bytes().partition(b"\n")
    except OSError:
        return None
    return content if hashlib.sha256(content).hexdigest().encode() == digest else None


def sealed_line(text: str) -> str:
    """`text`, which has no line break, with its sha256 in front."""
    return f"{hashlib.sha256(text.encode()).hexdigest()} {text}"


def unsealed_line(line: str) -> str | None:
    """What `sealed_line` sealed, or None when it is something else."""
    text = line[_HEX + 1 :]
    return text if line == sealed_line(text) else None


def file_digest(path: Path) -> str:
    """sha256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _files(folder: Path) -> dict[str, Path]:
    return {
        path.relative_to(folder).as_posix(): path
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path != folder / SEAL_NAME
    }
