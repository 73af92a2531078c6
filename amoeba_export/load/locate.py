"""From what the user calls a model to the folder that holds it."""

from __future__ import annotations

import re
from pathlib import Path

from amoeba_export.errors import InputError, NotFound
from amoeba_export.ir import SILENT, Progress
from amoeba_export.load.demo import demo_gguf, unpack_gguf
from amoeba_export.locations import require_utf8, writing_cache

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_HUB_FILES = ("*.json", "*.safetensors", "tokenizer*", "*.model", "*.jinja", "vocab.txt", "merges.txt")
_HUB_IGNORED = ("consolidated*", "*/*")
"""The same weights once more, in their author's own format, and what lies in subfolders."""


def locate_model(model: str, *, cache_dir: Path, progress: Progress = SILENT) -> tuple[str, Path]:
    """Name and folder of `demo`, a folder, a GGUF file or a hub id, in that order.

    Raises:
        NotFound: There is no such folder, and no such model on the hub or in its local cache.
        NotUtf8: The folder's path cannot be given to the libraries that read it.
        InputError: The hub cannot be asked, or refuses.
    """
    if model == "demo":
        with writing_cache(cache_dir):
            return "demo", unpack_gguf(demo_gguf(), cache_dir=cache_dir, progress=progress)
    path = Path(model).expanduser()
    require_utf8(path)
    if path.is_dir():
        return path.resolve().name, path
    if path.suffix == ".gguf":
        with writing_cache(cache_dir):
            return path.stem, unpack_gguf(path, cache_dir=cache_dir, progress=progress)
    if path.exists():
        raise InputError(
            "A model is a folder, not a file.", where=path, next_step="Give the folder that holds config.json."
        )
    if not _HUB_ID.fullmatch(model):
        raise NotFound("The model", model, next_step="Give a folder, a hub id such as org/name, or 'demo'.")
    return model, _download(model, progress)


def _download(model: str, progress: Progress) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    progress.note(f"Looking for {model} on the Hugging Face hub")
    try:
        return Path(snapshot_download(model, allow_patterns=list(_HUB_FILES), ignore_patterns=list(_HUB_IGNORED)))
    except GatedRepoError as error:
        raise InputError(
            f"{model} is a gated model, and the hub did not let us in.",
            next_step=f"Accept its terms at https://huggingface.co/{model}, then run 'hf auth login'.",
        ) from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise NotFound(
            "The model", model, next_step="There is no such folder and no such model on the hub: check the spelling."
        ) from error
    except LocalEntryNotFoundError as error:
        raise NotFound(
            "The model",
            model,
            next_step="It is not in the local hub cache and the hub cannot be reached: go online, or give a folder.",
        ) from error
    except (HfHubHTTPError, OSError) as error:
        raise InputError(f"{model} could not be downloaded: {error}", next_step="Try again later.") from error
