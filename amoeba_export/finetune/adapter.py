"""Trained low-rank weights on disk, under the key names that upstream (SMoL) and peft (plain LoRA) read.

SMoL    base_model.model.{module}.lora_{A,B}.{expert}.weight, base_model.lora_sparsemoe.router.*
LoRA    base_model.model.{module}.lora_{A,B}.weight
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from amoeba_export.errors import DamagedFile, NotFound, WrongModel
from amoeba_export.finetune.smol import TrainedLowRank

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
_ROUTER = "base_model.lora_sparsemoe.router."


def saved_weights(low_rank: TrainedLowRank) -> Iterator[tuple[str, torch.nn.Parameter, int | None]]:
    """Every weight as it is saved: (key, the parameter that it lies in, which expert of it or None for all of it)."""
    experts = range(low_rank.settings.experts) if low_rank.gate is not None else None
    for module in low_rank.shapes:
        for letter, parameter in (("A", low_rank.a_of(module)), ("B", low_rank.b_of(module))):
            prefix = f"base_model.model.{module}.lora_{letter}"
            if experts is None:
                yield f"{prefix}.weight", parameter, 0
            else:
                yield from ((f"{prefix}.{expert}.weight", parameter, expert) for expert in experts)
    if low_rank.gate is not None:
        for name, parameter in low_rank.gate.named_parameters():
            yield _ROUTER + name, parameter, None


def write_adapter(folder: Path, low_rank: TrainedLowRank, *, base_model: str) -> None:
    """Write `adapter_config.json` and `adapter_model.safetensors` into an existing folder."""
    settings = low_rank.settings
    config: dict[str, Any] = {
        "base_model_name_or_path": base_model,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": settings.alpha,
        "lora_dropout": 0.0,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": settings.rank,
        "target_modules": list(settings.targets),
        "task_type": "CAUSAL_LM",
        "use_dora": False,
        "use_rslora": False,
    }
    if low_rank.gate is not None:
        config |= {
            "use_moe_lora": True,
            "num_experts": settings.experts,
            "top_k": settings.top_k,
            "width_choice": "[" + ",".join(f"{width:.17g}" for width in low_rank.gate.widths) + "]",
        }
    (folder / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    tensors = {
        name: (parameter if expert is None else parameter[expert]).detach().cpu().contiguous().clone()
        for name, parameter, expert in saved_weights(low_rank)
    }
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def read_weights(file: Path, low_rank: TrainedLowRank) -> None:
    """Fill `low_rank` from a file that `write_adapter` (or upstream) wrote for the same settings.

    Raises:
        NotFound: There is no such file.
        DamagedFile: It is not a safetensors file.
        WrongModel: It has other weights, or other shapes.
    """
    if not file.is_file():
        raise NotFound("The adapter's weights", file)
    try:
        tensors = load_file(file)
    except SafetensorError as error:
        raise DamagedFile(file, str(error)) from error
    problems = []
    with torch.no_grad():
        for name, parameter, expert in saved_weights(low_rank):
            target = parameter if expert is None else parameter[expert]
            tensor = tensors.pop(name, None)
            if tensor is None:
                problems.append(f"{name} is missing")
            elif tensor.shape != target.shape:
                problems.append(f"{name} is {tuple(tensor.shape)}, expected {tuple(target.shape)}")
            else:
                target.copy_(tensor)
    problems += [f"{name} is not expected" for name in tensors]
    if problems:
        raise WrongModel("The adapter", problems, where=file)
