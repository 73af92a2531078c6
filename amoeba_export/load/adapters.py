"""Adapter folders: `adapter_config.json` and its weights, opened as plain LoRA or as a mixture with a gate (SMoL)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from amoeba_export.errors import DamagedFile, NotFound, UnsupportedAdapter
from amoeba_export.ir import Adapter, Architecture, Family, InputId, TensorSource
from amoeba_export.load.checkpoint import open_file
from amoeba_export.load.families import linear_shapes
from amoeba_export.load.identity import model_identity
from amoeba_export.load.lora import LoraAdapter
from amoeba_export.load.smol import SmolAdapter
from amoeba_export.load.unpickle import load_pickled_weights

CONFIG = "adapter_config.json"
WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")

_INITS = (True, False, None, "gaussian", "eva", "orthogonal")
"""Values of init_lora_weights that leave the base weights as they are."""

_SAYS_NOTHING = (
    *("peft_type", "task_type", "peft_version", "auto_mapping", "base_model_name_or_path", "revision"),
    *("inference_mode", "lora_dropout", "init_lora_weights", "megatron_core", "qalora_group_size"),
    # peft too ignores fan_in_fan_out on torch.nn.Linear; these only say how training began.
    *("fan_in_fan_out", "eva_config", "corda_config", "lora_ga_config", "loftq_config"),
)
_READ = (
    *("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora", "bias"),
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"),
)
_READ_SMOL = ("use_moe_lora", "num_experts", "top_k", "width_choice")


def read_adapter(folder: Path, *, family: Family, architecture: Architecture, cache_dir: Path) -> Adapter:
    """Open an adapter folder and check it against the model. Reads no weight of it.

    Args:
        folder: Has `adapter_config.json` and `adapter_model.safetensors` (or `.bin`).
        family: Of the model.
        architecture: Of the model.
        cache_dir: Where digests are remembered.

    Raises:
        NotFound: A file is missing.
        DamagedFile: A file is truncated, or is not what its name says.
        UnsafePickle: A `.bin` file names something other than tensors.
        WrongModel: It was made for a model of other dims.
        UnsupportedAdapter: It uses an option that cannot be merged, named.
    """
    config = _read_config(folder / CONFIG)
    is_smol = bool(config.get("use_moe_lora"))
    _check_options(config, is_smol=is_smol, where=folder / CONFIG)
    path, weights = _open_weights(folder)
    content = {key: sorted(value) if isinstance(value, list) else value for key, value in config.items()}
    sha256 = model_identity(content, [path], cache_dir=cache_dir)
    adapter_class = SmolAdapter if is_smol else LoraAdapter
    return adapter_class.open(
        config,
        weights,
        linears=linear_shapes(family, architecture),
        num_layers=architecture.num_layers,
        identity=InputId(role="adapter", id=folder.resolve().name, sha256=sha256),
        where=path,
    )


def _read_config(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise NotFound("The adapter's config", path, next_step="Give a folder that peft's save_pretrained wrote.")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DamagedFile(path, f"not JSON ({error})") from error
    if not isinstance(config, dict):
        raise DamagedFile(path, "not a JSON object")
    return config


def _check_options(config: Mapping[str, Any], *, is_smol: bool, where: Path) -> None:
    """Refuse what would change the result in a way that we do not compute.

    peft adds options with every release and writes each of them into every config. One that we do not know is harmless
    while it is off (null, false, 0 or empty).
    """
    if config.get("peft_type") != "LORA":
        raise UnsupportedAdapter(f"the method {config.get('peft_type')}", where=where)
    if config.get("bias", "none") != "none":
        raise UnsupportedAdapter(f"bias = {config['bias']!r}", where=where)
    if config.get("init_lora_weights", True) not in _INITS:
        raise UnsupportedAdapter(
            f"init_lora_weights = {config['init_lora_weights']!r}, which changes the base weights", where=where
        )
    known = _SAYS_NOTHING + _READ + (_READ_SMOL if is_smol else ())
    for key, value in config.items():
        if key not in known and value:
            raise UnsupportedAdapter(f"{key} = {value!r}", where=where)
        if is_smol and key in ("use_dora", "rank_pattern", "alpha_pattern") and value:
            raise UnsupportedAdapter(f"{key} together with a mixture of LoRAs", where=where)


def _open_weights(folder: Path) -> tuple[Path, TensorSource]:
    for name in WEIGHTS:
        path = folder / name
        if path.is_file():
            return path, load_pickled_weights(path) if path.suffix == ".bin" else open_file(path)
    raise NotFound(
        "The adapter's weight file", folder / WEIGHTS[0], next_step="Give a folder that peft's save_pretrained wrote."
    )
