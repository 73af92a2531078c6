"""Load: from a model's name, a strategy and adapters to a `Supernet` whose weights are not read yet."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from amoeba_export import locations
from amoeba_export.errors import NotFound
from amoeba_export.ir import SILENT, InputId, Progress, Supernet, TensorSource
from amoeba_export.load.families import quantization_method, read_architecture
from amoeba_export.load.identity import model_identity
from amoeba_export.load.links import refuse_links_outside
from amoeba_export.load.locate import locate_model
from amoeba_export.load.sidecars import check_sidecars
from amoeba_export.load.strategy import check_strategy, read_strategy, write_strategy
from amoeba_export.load.wrappers import is_wrapper, text_config, text_name
from amoeba_export.reading import read_json_object
from amoeba_export.shown import an

if TYPE_CHECKING:
    from amoeba_export.load.upstream import import_upstream

__all__ = ["check_strategy", "import_upstream", "load_supernet", "read_strategy", "write_strategy"]


def load_supernet(
    model: str,
    *,
    adapters: Sequence[Path] = (),
    strategy: Path | None = None,
    cache_dir: Path | None = None,
    progress: Progress = SILENT,
) -> Supernet:
    """Open a model: find it, read its config and headers, check that all belongs together. Reads no weight.

    Args:
        model: A Hugging Face folder, a hub id, a GGUF file, or `demo`.
        adapters: Adapter folders, applied in order.
        strategy: A `strategy.safetensors`.
        cache_dir: Where unpacked models and digests are kept; `locations.cache_dir()` when None.
        progress: Told what takes time.

    Raises:
        InputError: Something is missing, damaged, or belongs to another model.
        UnsupportedError: The family, the quantization, or an option of an adapter is one that we do not compute.
    """
    from amoeba_export.load.adapters import add_adapter
    from amoeba_export.load.stored import open_tensors

    cache_dir = cache_dir or locations.cache_dir()
    name, folder = locate_model(model, cache_dir=cache_dir, progress=progress)
    refuse_links_outside(folder)
    config_path = folder / "config.json"
    config = _read_config(config_path)
    own, rename = _text_model(name, folder, config, progress) if is_wrapper(config) else (config, None)
    architecture, file = read_architecture(own, where=config_path)
    check_sidecars(folder)
    files, tensors = open_tensors(folder, file, architecture, rename)
    if method := quantization_method(config):
        progress.note(
            f"{name} is quantized ({method}); its weights are dequantized as they are read. Subnets are cut from "
            "these, and compared with them: they differ from the weights before quantization by its rounding. An "
            "adapter trained on the quantized model is merged into the dequantized one."
        )
    _say_types(name, tensors, progress)
    identity = model_identity(config, files.files, cache_dir=cache_dir, progress=progress)
    supernet = Supernet(
        name=name,
        folder=folder,
        architecture=architecture,
        family=file.family,
        tensors=tensors,
        identity=identity,
        inputs=(InputId(role="model", id=name, sha256=identity),),
    )
    for path in adapters:
        supernet = add_adapter(supernet, path, cache_dir=cache_dir, progress=progress)
    if strategy is not None:
        known = read_strategy(strategy)
        check_strategy(known, supernet, where=strategy)
        entry = InputId(role="strategy", id=strategy.name, sha256=known.identity or "")
        supernet = dataclasses.replace(supernet, strategy=known, inputs=(*supernet.inputs, entry))
    return supernet


def _text_model(
    name: str, folder: Path, config: Mapping[str, Any], progress: Progress
) -> tuple[dict[str, Any], Callable[[str], str | None]]:
    """Config of the text model inside a model that also sees or hears, and what it calls the weights of the whole."""
    from amoeba_export.load.checkpoint import stored_names

    where = folder / "config.json"
    own = text_config(config, where=where)
    family = read_architecture(own, where=where)[1].family
    rename = partial(text_name, family=family)
    own["tie_word_embeddings"] = family.weight("head") not in map(rename, stored_names(folder))
    progress.note(
        f"{name} is {an(config['model_type'])}: its text model, {an(family.model_type)}, is taken. "
        "What sees or hears is left out."
    )
    return own, rename


def _say_types(name: str, tensors: TensorSource, progress: Progress) -> None:
    """Tell of weights that are not all of one type that we write: each keeps its own where nothing else is asked."""
    counts = Counter(str(tensors.dtype(weight)).removeprefix("torch.") for weight in tensors.names())
    if counts.keys() <= {"float64"}:
        progress.note(f"The weights of {name} are float64; they are written as float32, or as --dtype says.")
    elif len(counts) > 1:
        kinds = ", ".join(f"{count} in {kind}" for kind, count in sorted(counts.items()))
        wide = " (float64 as float32)" if "float64" in counts else ""
        progress.note(
            f"The weights of {name} are of several types: {kinds}. Without --dtype, safetensors keep each{wide}, and "
            "config.json names the widest type of a matrix; the other formats have one type for all."
        )


def __getattr__(name: str) -> Any:
    """Where a model lies and what its files are can be asked without torch, which only weights and pickles need."""
    if name != "import_upstream":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from amoeba_export.load.upstream import import_upstream

    return import_upstream


def _read_config(path: Path) -> dict[str, Any]:
    if not path.is_file():
        next_step = "Give the folder that holds config.json."
        if (path.parent / "adapter_config.json").is_file():
            next_step = "This is an adapter: give the model that it was trained on, and this folder as --adapter."
        elif (path.parent / "amoeba.json").is_file():
            next_step = "This is an artifact of amoeba: give the safetensors folder inside it."
        raise NotFound("The model's config", path, next_step=next_step)
    return read_json_object(path, what="The model's config")
