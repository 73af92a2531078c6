"""Cosines and sines of RoPE, by transformers' own arithmetic, for whatever a family says of it."""

from __future__ import annotations

from typing import Any

import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from amoeba_export.ir import Architecture, Rope

_READ = (
    *("rope_type", "factor", "original_max_position_embeddings", "attention_factor", "beta_fast", "beta_slow"),
    *("mscale", "mscale_all_dim", "low_freq_factor", "high_freq_factor", "short_factor", "long_factor", "truncate"),
)
"""Parameters that angles are computed from; transformers warns of others."""


class Rotary:
    """Angles of one RoPE: tables [B, T, R] by position. Those of `dynamic` and `longrope` depend on the last one."""

    def __init__(self, rope: Rope, architecture: Architecture, device: torch.device) -> None:
        config = LlamaConfig(
            hidden_size=rope.dims,
            num_attention_heads=1,
            head_dim=rope.dims,
            max_position_embeddings=architecture.max_positions,
            rope_parameters={
                "rope_type": "default",
                **{key: value for key, value in (rope.scaling or {}).items() if key in _READ},
                "rope_theta": rope.theta,
            },
        )
        self._module: Any = LlamaRotaryEmbedding(config).to(device)

    def __call__(self, x: torch.Tensor, positions_BT: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and sines, in the dtype and on the device of `x`."""
        cos, sin = self._module(x, positions_BT)
        return cos, sin
