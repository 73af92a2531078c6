"""What is asked of transformers' models, whatever its version calls it."""

from __future__ import annotations

import inspect
from typing import Any

import torch


def cache_name(model: Any) -> str:
    """What a model calls its KV cache: it has another name since transformers 5.24."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"


def rope_tables(model: Any, num_positions: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines [P, R / 2] of a model, with their magnitude.

    Those of models with a RoPE per layer type are side by side, by the name of the type.
    """
    positions, rotary = torch.arange(num_positions)[None], model.model.rotary_emb
    by_type = "layer_type" in inspect.signature(rotary.forward).parameters
    names = [{"layer_type": name} for name in sorted(set(model.config.layer_types))] if by_type else [{}]
    tables = [rotary(torch.zeros(1), position_ids=positions, **name) for name in names]
    halves = [[table[0, :, : table.shape[-1] // 2].float() for table in pair] for pair in tables]
    cos, sin = (torch.cat(parts, dim=-1) for parts in zip(*halves, strict=True))
    return cos, sin
