"""RoPE as tables of cosines and sines, in the arithmetic of transformers so that they agree to the bit."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from amoeba_export.ir import Architecture

TABULATED_TYPES = ("default", "linear", "llama3", "yarn")
"""RoPE types whose angles depend on the position alone. `dynamic` and `longrope` change with the sequence length."""


def rope_type(architecture: Architecture) -> str:
    """The RoPE type of a model."""
    return str((architecture.rope_scaling or {}).get("rope_type", "default"))


def rope_tables(architecture: Architecture) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """Cosines and sines [positions, H / 2] for every position of the model's context."""
    frequency_H, factor = _frequencies(architecture)
    positions_T = torch.arange(architecture.max_positions, dtype=torch.float32)
    angle_TH = positions_T[:, None] * frequency_H
    return (angle_TH.cos() * factor).numpy(), (angle_TH.sin() * factor).numpy()


def _frequencies(architecture: Architecture) -> tuple[torch.Tensor, float]:
    """Angles per position [H / 2], and what cosines and sines are multiplied with."""
    kind, head_dim, theta = rope_type(architecture), architecture.head_dim, architecture.rope_theta
    if kind == "default":
        exponents_H = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
        return 1.0 / (theta**exponents_H), 1.0
    # Only here, because it costs a second and 20 MB, and plain RoPE is what most models have.
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    config = LlamaConfig(
        hidden_size=architecture.hidden_size,
        num_attention_heads=architecture.num_heads,
        num_key_value_heads=architecture.num_kv_heads,
        head_dim=head_dim,
        max_position_embeddings=architecture.max_positions,
        rope_parameters={**(architecture.rope_scaling or {}), "rope_theta": theta},
    )
    frequency_H, factor = ROPE_INIT_FUNCTIONS[kind](config)
    return frequency_H, float(factor)
