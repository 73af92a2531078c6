"""What is asked of transformers' models, whatever its version calls it."""

from __future__ import annotations

import inspect
from typing import Any

import torch


def cache_name(model: Any) -> str:
    """What a model calls its KV cache: it has another name since transformers 5.24."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"


def rope_tables(model: Any, num_positions: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines [P, H / 2] of a Llama-like model, with their magnitude."""
    positions = torch.arange(num_positions)[None]
    cos, sin = model.model.rotary_emb(torch.zeros(1), position_ids=positions)
    half = cos.shape[-1] // 2
    return cos[0, :, :half].float(), sin[0, :, :half].float()
