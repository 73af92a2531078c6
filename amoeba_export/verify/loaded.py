"""What is asked of transformers' models, whatever its version calls it."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch


def cache_name(model: Any) -> str:
    """What a model calls its KV cache: it has another name since transformers 5.24."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"


def side_by_side(pairs: Sequence[Sequence[torch.Tensor]]) -> list[torch.Tensor]:
    """Cosines and sines [P, R / 2] of several kinds of layers as one pair, each that differs from the first once."""
    first, *others = pairs
    apart = [pair for pair in others if not all(map(torch.equal, pair, first))]
    return [torch.cat(parts, dim=-1) for parts in zip(first, *apart, strict=True)]


def rope_tables(model: Any, num_positions: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines of a model, with their magnitude: see `Rope`."""
    rotary, config = model.model.rotary_emb, model.config
    by_type = "layer_type" in inspect.signature(rotary.forward).parameters
    names = [{"layer_type": name} for name in sorted(set(config.layer_types))] if by_type else [{}]
    parameters, lengths = config.rope_parameters or {}, [num_positions]
    if parameters.get("rope_type") == "longrope":
        lengths.insert(0, min(int(parameters["original_max_position_embeddings"]), num_positions))
    rows = []
    for length in lengths:
        tables = [rotary(torch.zeros(1), position_ids=torch.arange(length)[None], **name) for name in names]
        halves = [[table[0, :, : table.shape[-1] // 2].float() for table in pair] for pair in tables]
        rows.append(side_by_side(halves))
    cos, sin = (torch.cat(parts) for parts in zip(*rows, strict=True))
    return cos, sin
