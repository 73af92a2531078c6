"""What llama.cpp is told of RoPE and windows, which may differ between layers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

from amoeba_export.ir import DenseArchitecture, LayerKind, Rope
from amoeba_export.llama_cpp.architectures import LlamaCppArchitecture, has_window


def kinds_of(dense: DenseArchitecture) -> list[LayerKind]:
    """How each layer attends."""
    return [dense.kind(layer) for layer in dense.layers]


def is_windowed(kind: LayerKind, dense: DenseArchitecture) -> bool:
    """Whether a window leaves anything out."""
    return kind.window is not None and kind.window < dense.base.max_positions


def window_pattern(architecture: LlamaCppArchitecture, dense: DenseArchitecture) -> tuple[int | None, Any]:
    """The window of layers that have one, and what tells llama.cpp which have it; None where nothing needs be said.

    Its own period is left unsaid and another period is one number: older versions read no list.
    """
    kinds = kinds_of(dense)
    listed = [is_windowed(kind, dense) for kind in kinds]
    window = next((kind.window for kind in kinds if is_windowed(kind, dense)), None)
    if window is None:
        return (architecture.window, 1) if architecture.window else (None, None)
    for pattern in (None, *range(len(listed) + 2)):
        if all(has_window(architecture, i, pattern) == is_local for i, is_local in enumerate(listed)):
            return window, pattern
    return window, listed


def global_rope(dense: DenseArchitecture) -> Rope | None:
    """RoPE of layers without a window, or of all where all have one."""
    kinds = sorted(kinds_of(dense), key=lambda kind: is_windowed(kind, dense))
    return next((kind.rope for kind in kinds if kind.rope is not None), None)


def local_rope(dense: DenseArchitecture) -> Rope | None:
    """RoPE of layers with a window."""
    return next((kind.rope for kind in kinds_of(dense) if is_windowed(kind, dense)), None)


def rope_type(rope: Rope) -> str:
    """The type that transformers calls a RoPE."""
    return str((rope.scaling or {}).get("rope_type", "default"))


def rope_key(rope: Rope | None) -> tuple[float | None, bool]:
    """The base, and whether it is scaled."""
    return (None, False) if rope is None else (rope.theta, rope.scaling is not None)


def yarn_magnitude(scaling: Mapping[str, Any]) -> float:
    """By what YaRN multiplies sine and cosine, as a share of llama.cpp's own 0.1 ln(factor) + 1."""

    def grown(weight: float) -> float:
        return 1.0 + 0.1 * weight * math.log(max(scaling["factor"], 1.0))

    magnitude = scaling.get("attention_factor")
    if magnitude is None:
        mscale, mscale_all_dim = scaling.get("mscale"), scaling.get("mscale_all_dim")
        magnitude = grown(mscale) / grown(mscale_all_dim) if mscale and mscale_all_dim else grown(1.0)
    return float(magnitude / grown(1.0))


def longrope_magnitude(rope: Rope, max_positions: int) -> float:
    """By what LongRoPE multiplies sine and cosine (transformers' rule)."""
    scaling = rope.scaling or {}
    if (magnitude := scaling.get("attention_factor")) is not None:
        return float(magnitude)
    original = scaling["original_max_position_embeddings"]
    factor = scaling.get("factor") or max_positions / original
    return 1.0 if factor <= 1.0 else math.sqrt(1 + math.log(factor) / math.log(original))


def rope_factors(dense: DenseArchitecture) -> dict[str, torch.Tensor]:
    """Tensors of a file that say by what frequencies are divided [R / 2], by name; none for most RoPE.

    llama3 scaling: long waves are slowed by `factor`, short ones kept, those between interpolated (Llama 3.1's rule).
    LongRoPE: one tensor for texts within the first training's length, one for longer ones.
    """
    rope = global_rope(dense)
    scaling = (rope.scaling if rope is not None else None) or {}
    if rope is None or scaling.get("rope_type") not in ("llama3", "longrope"):
        return {}
    if scaling["rope_type"] == "longrope":
        return {
            f"rope_factors_{which}.weight": torch.tensor(scaling[f"{which}_factor"], dtype=torch.float32)
            for which in ("long", "short")
        }
    half = torch.arange(0, rope.dims, 2, dtype=torch.float64)
    waves = 2 * torch.pi * rope.theta ** (half / rope.dims)
    factor, low, high = scaling["factor"], scaling["low_freq_factor"], scaling["high_freq_factor"]
    turns = scaling["original_max_position_embeddings"] / waves
    blend = ((turns - low) / (high - low)).clamp(0, 1)
    divisors: torch.Tensor = (1 / ((1 - blend) / factor + blend)).to(torch.float32)
    return {"rope_freqs.weight": divisors}
