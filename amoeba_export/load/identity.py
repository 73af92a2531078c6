"""What a file is, by content. Hashing 13 GB takes a while, so a digest is remembered for as long as the file stays."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from amoeba_export.ir import SILENT, Progress

SETTLED_SECONDS = 2.0
"""A file younger than this could change again within one tick of its clock; its digest is not remembered."""

_NOT_CONTENT = ("transformers_version", "_name_or_path", "_model_name_or_path")


def file_sha256(path: Path, *, cache_dir: Path, progress: Progress = SILENT) -> str:
    """sha256 of a file, from the cache when path, size, times and inode are those of the last time."""
    stat = path.stat()
    facts = f"{path.resolve()}\0{stat.st_size}\0{stat.st_mtime_ns}\0{stat.st_ctime_ns}\0{stat.st_ino}"
    remembered = cache_dir / "sha256" / hashlib.sha256(facts.encode()).hexdigest()
    with contextlib.suppress(OSError):
        digest = remembered.read_text(encoding="ascii")
        if len(digest) == 64:
            return digest
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if time.time() - stat.st_mtime > SETTLED_SECONDS:
        # A cache that cannot be written costs time, not correctness.
        with contextlib.suppress(OSError):
            remembered.parent.mkdir(parents=True, exist_ok=True)
            part = remembered.with_suffix(f".{os.getpid()}")
            part.write_text(digest, encoding="ascii")
            part.replace(remembered)
    return digest


def model_identity(
    config: Mapping[str, Any], files: Sequence[Path], *, cache_dir: Path, progress: Progress = SILENT
) -> str:
    """sha256 over the config and the weights files.

    Keys of the config that only say who wrote it are left out, so that saving the same model with another version of
    transformers does not make its strategies strangers.
    """
    content = {key: value for key, value in config.items() if key not in _NOT_CONTENT}
    digest = hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode())
    with ThreadPoolExecutor(max_workers=min(len(files), os.cpu_count() or 1)) as pool:
        hashes = pool.map(lambda path: file_sha256(path, cache_dir=cache_dir), files)
        with progress.track("Reading the model's identity", len(files)) as done:
            for path, sha256 in zip(files, hashes, strict=True):
                digest.update(f"\n{path.name} {sha256}".encode())
                done(1)
    return digest.hexdigest()
