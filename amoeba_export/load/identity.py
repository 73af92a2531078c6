"""What a file is, by content. Hashing 13 GB takes a while, so a digest is remembered for as long as the file stays."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from amoeba_export.cache import Cache
from amoeba_export.ir import SILENT, Progress

_NOT_CONTENT = ("transformers_version", "_name_or_path", "_model_name_or_path")


def file_sha256(path: Path, *, cache_dir: Path, progress: Progress = SILENT) -> str:
    """sha256 of a file, from the cache when path, size, times and inode are those of the last time."""
    return Cache(cache_dir).sha256(path, progress=progress)


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
