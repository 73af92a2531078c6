"""RoPE as tables of cosines and sines, computed by transformers' own code so that scaled variants agree to the bit."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from amoeba_export.ir import Architecture

TABULATED_TYPES = ("default", "linear", "llama3", "yarn")
"""RoPE types whose angles depend on the position alone. `dynamic` and `longrope` change with the sequence length."""


def rope_type(architecture: Architecture) -> str:
    """The RoPE type of a model."""
    return str((architecture.rope_scaling or {}).get("rope_type", "default"))


def rope_tables(architecture: Architecture) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """Cosines and sines [positions, H / 2] for every position of the model's context."""
    config = LlamaConfig(
        hidden_size=architecture.hidden_size,
        num_attention_heads=architecture.num_heads,
        num_key_value_heads=architecture.num_kv_heads,
        head_dim=architecture.head_dim,
        max_position_embeddings=architecture.max_positions,
        rope_parameters={
            "rope_type": "default",
            **(architecture.rope_scaling or {}),
            "rope_theta": architecture.rope_theta,
        },
    )
    half = architecture.head_dim // 2
    positions_BT = torch.arange(architecture.max_positions)[None]
    cos_BTH, sin_BTH = LlamaRotaryEmbedding(config)(torch.zeros(1), positions_BT)
    # The second half of each row repeats the first.
    return cos_BTH[0, :, :half].numpy(), sin_BTH[0, :, :half].numpy()
