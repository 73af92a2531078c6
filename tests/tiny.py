"""Tiny real models, built from a config and a seed: what the tests cut instead of downloads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

VOCAB = 128

_FAMILIES: dict[str, dict[str, Any]] = {
    # GQA 6/3 with a head_dim that is not hidden / heads, tied embeddings
    "llama": {
        "hidden_size": 96,
        "num_attention_heads": 6,
        "num_key_value_heads": 3,
        "head_dim": 32,
        "tie_word_embeddings": True,
    },
    # MHA, untied: the shape of Llama-2
    "llama-mha": {"num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 16, "tie_word_embeddings": False},
    "mistral": {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "sliding_window": None},
    "qwen2": {"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True},
    "qwen3": {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "tie_word_embeddings": False},
}
FAMILIES = tuple(_FAMILIES)
"""The families that every room is tested with; `tests/families` has the others."""


def tiny_config(family: str = "llama", **overrides: Any) -> Any:
    """The config of a tiny model: 4 layers, hidden 64 (96 for llama), FFN 96, vocabulary 128."""
    settings: dict[str, Any] = {
        "num_hidden_layers": 4,
        "hidden_size": 64,
        "intermediate_size": 96,
        "vocab_size": VOCAB,
        "max_position_embeddings": 256,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    settings |= _FAMILIES[family]
    settings |= overrides
    return AutoConfig.for_model(family.split("-")[0], **settings)


def filled(model: Any) -> Any:
    """`model` with weights large enough that every layer matters, norms and biases not at their defaults."""
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() > 1:
                weight.normal_(0, 0.15)
            elif name.endswith("bias"):
                weight.normal_(0, 0.1)
            else:
                weight.normal_(1, 0.1)
    return model.eval()


def tiny_model(family: str = "llama", *, seed: int = 0, **overrides: Any) -> Any:
    """A tiny model with weights large enough that every layer matters, norms and biases not at their defaults."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(tiny_config(family, **overrides), dtype=torch.float32)
    return filled(model)


def save_tiny(folder: Path, family: str = "llama", *, seed: int = 0, **overrides: Any) -> Path:
    """Save a tiny model as a Hugging Face directory and return the directory."""
    tiny_model(family, seed=seed, **overrides).save_pretrained(folder)
    return folder
