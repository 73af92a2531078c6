"""Adapter folders: `adapter_config.json` and its weights, opened as plain LoRA or as a mixture with a gate (SMoL)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from amoeba_export.errors import DamagedFile, NotFound, UnsupportedAdapter
from amoeba_export.ir import SILENT, InputId, Progress, Supernet, TensorSource
from amoeba_export.load.adapter_names import AdapterWeights, sort_weights
from amoeba_export.load.checkpoint import open_file
from amoeba_export.load.experts import refuse_experts
from amoeba_export.load.families import expected_weights, matrix_shapes
from amoeba_export.load.fused import parts_of, stored_shapes
from amoeba_export.load.fused_adapters import with_split_modules, with_split_weights
from amoeba_export.load.identity import model_identity
from amoeba_export.load.links import refuse_links_outside
from amoeba_export.load.lora import LoraAdapter, check_biases, check_targets
from amoeba_export.load.own_weights import possible_weights, with_own_weights
from amoeba_export.load.sidecars import check_sidecars
from amoeba_export.load.smol import GATE_WEIGHTS, SmolAdapter
from amoeba_export.load.unpickle import load_pickled_weights
from amoeba_export.reading import read_json_object

CONFIG = "adapter_config.json"
WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json")
"""Files one of which a tokenizer is made from."""

_INITS = (True, False, None, "gaussian", "eva", "orthogonal")
"""Values of init_lora_weights that leave the base weights as they are."""

_SAYS_NOTHING = (
    *("peft_type", "task_type", "peft_version", "auto_mapping", "base_model_name_or_path", "revision"),
    *("inference_mode", "lora_dropout", "init_lora_weights", "megatron_core", "qalora_group_size"),
    # peft too ignores fan_in_fan_out on torch.nn.Linear; these only say how training began, or how it was done.
    *("fan_in_fan_out", "eva_config", "corda_config", "lora_ga_config", "loftq_config", "velora_config"),
    *("lora_dtype", "autocast_adapter_dtype", "lorap_lr_ratio", "lorap_emb_lr", "runtime_config"),
    # What it ties is in the file: LoRA or weights of both.
    "ensure_weight_tying",
)
_READ = (
    *("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora", "bias"),
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save"),
)
_NAMES = ("target_modules", "exclude_modules", "layers_pattern", "modules_to_save")
"""A list of names each; the first three may be one text instead: a pattern, or a name."""

_BIASES = ("none", "all", "lora_only")
_READ_SMOL = ("use_moe_lora", "num_experts", "top_k", "width_choice")


def add_adapter(supernet: Supernet, folder: Path, *, cache_dir: Path, progress: Progress = SILENT) -> Supernet:
    """`supernet` with the adapter of a folder, checked against it.

    LoRA is merged later, when a subnet is cut, and no weight of it is read here. Weights that the adapter brings whole
    take the place of the model's at once; where these are the embedding and a tied head, they are compared.

    Args:
        supernet: With the adapters that come before this one.
        folder: Has `adapter_config.json` and `adapter_model.safetensors` (or `.bin`), and a tokenizer of its own where
            it changes the size of the vocabulary.
        cache_dir: Where digests are remembered.
        progress: Told when the model is no longer what its config says.

    Raises:
        NotFound: A file is missing.
        LinkOutside: A file is a link out of the folder.
        DamagedFile: A file is truncated, or is not what its name says.
        UnsafePickle: A `.bin` file names something other than tensors.
        WrongModel: It was made for a model of other dims.
        UnsupportedAdapter: It uses an option that cannot be merged, named.
    """
    if folder.is_dir():
        refuse_links_outside(folder)
    config = _read_config(folder / CONFIG)
    is_smol = bool(config.get("use_moe_lora"))
    _check_options(config, is_smol=is_smol, where=folder / CONFIG)
    path, source = _open_weights(folder)
    content = {key: _in_any_order(value) for key, value in config.items()}
    sha256 = model_identity(content, [path], cache_dir=cache_dir)
    entry = InputId(role="adapter", id=folder.resolve().name, sha256=sha256)
    names = [name for name in source.names() if not (is_smol and name in GATE_WEIGHTS)]
    refuse_experts(names, supernet.family, path)
    possible = possible_weights(supernet.family, supernet.architecture)
    parts = parts_of(supernet.family, possible, supernet.architecture.num_layers)
    fused = {name: shape for name, shape in stored_shapes(possible, parts).items() if name not in possible}
    named = sort_weights(names, {**possible, **fused}, path)
    weights, source = with_split_weights(named, source, parts, fused, path)
    _check_own(weights, supernet, is_smol=is_smol, where=path)
    num_words = supernet.architecture.vocab_size
    supernet = with_own_weights(supernet, weights, source, where=path, progress=progress)
    matrices = matrix_shapes(supernet.family, supernet.architecture)
    matrices |= {name.removesuffix(".weight"): (shape[0], shape[1]) for name, shape in fused.items()}
    check_targets(config, named, matrices, path)
    check_biases(str(config.get("bias")), weights, expected_weights(supernet.family, supernet.architecture), path)
    adapter_class = SmolAdapter if is_smol else LoraAdapter
    opened = adapter_class.open(
        config,
        source,
        found=weights.lora,
        matrices=matrices,
        num_layers=supernet.architecture.num_layers,
        identity=entry,
        where=path,
    )
    adapter = with_split_modules(opened, parts, path)
    if supernet.architecture.vocab_size != num_words:
        supernet = _with_tokenizer(supernet, folder, num_words, progress)
    return dataclasses.replace(supernet, adapters=(*supernet.adapters, adapter), inputs=(*supernet.inputs, entry))


def _with_tokenizer(supernet: Supernet, folder: Path, num_words: int, progress: Progress) -> Supernet:
    resized = f"{folder.name} changes the vocabulary from {num_words} to {supernet.architecture.vocab_size} tokens"
    if not any((folder / name).is_file() for name in TOKENIZERS):
        progress.warn(f"The adapter {resized} but has no tokenizer: the model's own is written, without new tokens.")
        return supernet
    check_sidecars(folder)
    progress.note(f"The adapter {resized}: its tokenizer is written.")
    return dataclasses.replace(supernet, tokenizer_folder=folder)


def _check_own(weights: AdapterWeights, supernet: Supernet, *, is_smol: bool, where: Path) -> None:
    """Raise where whole weights and LoRA of this or an earlier adapter do not go together."""
    if is_smol and weights.own:
        raise UnsupportedAdapter(f"{min(weights.own)} together with a mixture of LoRAs", where=where)
    replaced = {name.removesuffix(".weight") for name in weights.own}
    for earlier in supernet.adapters:
        if both := sorted(replaced & set(earlier.modules())):
            raise UnsupportedAdapter(f"a whole weight of {both[0]}, which {earlier.input.id} changes", where=where)


def _read_config(path: Path) -> dict[str, Any]:
    return read_json_object(
        path, what="The adapter's config", missing="Give a folder that peft's save_pretrained wrote."
    )


def _in_any_order(value: Any) -> Any:
    """Lists of names are sets to peft, which writes them in any order."""
    if not isinstance(value, list):
        return value
    try:
        return sorted(value)
    except TypeError:  # of several types: no list of names
        return value


def _check_options(config: Mapping[str, Any], *, is_smol: bool, where: Path) -> None:
    """Refuse what would change the result in a way that we do not compute.

    peft adds options with every release and writes each of them into every config. One that we do not know is harmless
    while it is off: null, false, 0, empty, or made of nothing else.
    """
    if config.get("peft_type") != "LORA":
        raise UnsupportedAdapter(f"the method {config.get('peft_type')}", where=where)
    if config.get("bias", "none") not in _BIASES:
        raise DamagedFile(where, f"its bias is {config['bias']!r}, and can be {', '.join(_BIASES)}")
    if config.get("init_lora_weights", True) not in _INITS:
        raise UnsupportedAdapter(
            f"init_lora_weights = {config['init_lora_weights']!r}, which changes the base weights", where=where
        )
    for key in _NAMES:
        names = config.get(key)
        if isinstance(names, str) and key != "modules_to_save":
            continue
        if names and not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
            raise DamagedFile(where, f"its {key} is no list of names")
    known = _SAYS_NOTHING + _READ + (_READ_SMOL if is_smol else ())
    for key, value in config.items():
        if key not in known and not _is_off(value):
            raise UnsupportedAdapter(f"{key} = {value!r}", where=where)
        if is_smol and key in ("use_dora", "rank_pattern", "alpha_pattern") and value:
            raise UnsupportedAdapter(f"{key} together with a mixture of LoRAs", where=where)


def _is_off(value: object) -> bool:
    if isinstance(value, dict):
        return all(map(_is_off, value.values()))
    return all(map(_is_off, value)) if isinstance(value, list) else not value


def _open_weights(folder: Path) -> tuple[Path, TensorSource]:
    for name in WEIGHTS:
        path = folder / name
        if path.is_file():
            return path, load_pickled_weights(path) if path.suffix == ".bin" else open_file(path)
    raise NotFound(
        "The adapter's weight file", folder / WEIGHTS[0], next_step="Give a folder that peft's save_pretrained wrote."
    )
