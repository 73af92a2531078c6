"""A transformers folder in W4A16, opened without the `compressed-tensors` package: its weights are unpacked here.

The package reads what `config.json` says of the integers, not what the files have. So the two must agree.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from amoeba_export.errors import DamagedFile
from amoeba_export.model.loading import ONE_AT_A_TIME
from amoeba_export.model.opening import blank_model, read_config
from amoeba_export.verify.stored.safetensors import SafetensorsWeights

_KEY = "quantization_config"

_SYMMETRIC = {"w4a16": True, "w4a16-asym": False}


def is_packed(folder: Path) -> bool:
    """Whether `config.json` says that weights are packed. Whatever it says is looked at by `read_packed`."""
    return _said(folder) is not None


def _said(folder: Path) -> Any:
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None  # opening it says what is wrong
    return config.get(_KEY) if isinstance(config, dict) else None


def read_packed(folder: Path) -> tuple[str, Any]:
    """The `--dtype`, and the model in fp32 with unpacked weights.

    Raises:
        DamagedFile: The config does not describe the files, or says more than amoeba writes.
    """
    said, path = _said(folder), folder / "config.json"
    stored = SafetensorsWeights(folder, None)
    weights = {name: stored.read(name) for name in stored.names()}
    kinds = {(one.dtype, one.block) for one in weights.values() if one.dtype in _SYMMETRIC}
    if len(kinds) != 1:
        raise DamagedFile(path, f"its weights are packed in {len(kinds)} ways, and it describes one")
    ((dtype, group),) = kinds
    with ONE_AT_A_TIME:
        config = read_config(folder)
        delattr(config, _KEY)
        model = blank_model(config, dtype=torch.float32)
    head = next(name for name, one in model.named_modules() if one is model.get_output_embeddings())
    if not _describes(said, head=head, symmetric=_SYMMETRIC[dtype], group=group):
        raise DamagedFile(path, f"it does not describe weights of {dtype} in groups of {group}")
    linears = {f"{name}.weight" for name, one in model.named_modules() if isinstance(one, torch.nn.Linear)}
    packed = {name for name, one in weights.items() if one.dtype in _SYMMETRIC}
    if odd := sorted(packed ^ (linears - {f"{head}.weight"})):
        state = "packed" if odd[0] in packed else "not packed"
        raise DamagedFile(folder, f"{odd[0]} is {state}, unlike what config.json says")
    tied = {name for name in model.state_dict() if name == f"{head}.weight" and config.tie_word_embeddings}
    missing, unexpected = model.load_state_dict({name: one.values for name, one in weights.items()}, strict=False)
    if wrong := sorted({*missing} - tied) + sorted(unexpected):
        raise DamagedFile(folder, f"{wrong[0]} is missing, or no part of the model")
    return dtype, model


def _describes(said: Any, *, head: str, symmetric: bool, group: int) -> bool:
    """Whether readers of `said` unpack every linear but the head from symmetric or other integers in such groups."""
    try:
        (scheme,) = said["config_groups"].values()
        weights, others = scheme["weights"], {**scheme, "weights": None, "targets": None}
    except (TypeError, KeyError, ValueError, AttributeError):
        return False
    integers = {"num_bits": 4, "type": "int", "symmetric": symmetric}
    groups = {"strategy": "group", "group_size": group, "dynamic": False}
    return (
        (said.get("quant_method"), said.get("format")) == ("compressed-tensors", "pack-quantized")
        and said.get("quantization_status") == "compressed"
        and (scheme["targets"], said.get("ignore")) == (["Linear"], [head])
        and all(weights.get(key) == value for key, value in {**integers, **groups}.items())
        and not weights.get("actorder")
        and not any(others.values())
        and not said.get("kv_cache_scheme")
    )
