"""A tiny config of every family and of what varies within it, for the tests that hold for all of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from tests.tiny import VOCAB, filled

SIZES: dict[str, Any] = {
    "num_hidden_layers": 4,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "intermediate_size": 96,
    "vocab_size": VOCAB,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_YARN = {
    "rope_type": "yarn",
    "rope_theta": 1e4,
    "factor": 4.0,
    "original_max_position_embeddings": 16,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
}
_LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "short_factor": [1.0, 1.1, 1.2, 1.3, 1.4, 1.5],
    "long_factor": [1.0, 1.5, 2.0, 2.5, 3.0, 4.0],
}

_EXPERTS = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 24}

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "gemma3": ("gemma3_text", {"sliding_window": 4, "sliding_window_pattern": 3, "query_pre_attn_scalar": 24}),
    "smollm3": ("smollm3", {}),
    "granite": (
        "granite",
        {
            "embedding_multiplier": 3.0,
            "attention_multiplier": 0.2,
            "residual_multiplier": 0.6,
            "logits_scaling": 2.0,
            "tie_word_embeddings": True,
        },
    ),
    "phi3": ("phi3", {}),
    "ministral3": (
        "ministral3",
        {"rope_parameters": {**_YARN, "llama_4_scaling_beta": 0.3, "original_max_position_embeddings": 4}},
    ),
    "gemma2": ("gemma2", {"sliding_window": 4, "query_pre_attn_scalar": 24, "final_logit_softcapping": 5.0}),
    "olmo2": ("olmo2", {}),
    "olmo3": ("olmo3", {"sliding_window": 4, "layer_types": [*["sliding_attention"] * 3, "full_attention"]}),
    "exaone4": ("exaone4", {"sliding_window": None, "layer_types": ["full_attention"] * 4}),
    "ministral": (
        "ministral",
        {"sliding_window": 4, "layer_types": ["full_attention", *["sliding_attention"] * 3]},
    ),
    "seed_oss": ("seed_oss", {}),
    "qwen3_moe": ("qwen3_moe", _EXPERTS | {"norm_topk_prob": True}),
}
"""Name -> `model_type`, and what differs from the sizes above."""

VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen2, windows above": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 2, "tie_word_embeddings": True},
    ),
    "qwen3, windows listed": (
        "qwen3",
        {
            "use_sliding_window": True,
            "sliding_window": 4,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention", "full_attention"],
        },
    ),
    "smollm3, windows and biases": (
        "smollm3",
        {
            "use_sliding_window": True,
            "sliding_window": 4,
            "no_rope_layer_interval": 2,
            "attention_bias": True,
            "tie_word_embeddings": False,
        },
    ),
    "smollm3, layers listed": ("smollm3", {"no_rope_layers": [0, 1, 1, 0], "mlp_bias": True}),
    "phi3, part of a head": ("phi3", {"partial_rotary_factor": 0.75, "tie_word_embeddings": True}),
    "phi3, longrope": (
        "phi3",
        {"partial_rotary_factor": 0.75, "original_max_position_embeddings": 16, "rope_parameters": _LONGROPE},
    ),
    "phi3, window": ("phi3", {"sliding_window": 4}),
    "gemma3, scaled": (
        "gemma3_text",
        {
            "sliding_window": 4,
            "layer_types": ["full_attention", "sliding_attention", "sliding_attention", "full_attention"],
            "final_logit_softcapping": 4.0,
            "attention_bias": True,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            },
        },
    ),
    "gemma2, no caps": (
        "gemma2",
        {"sliding_window": 4, "attn_logit_softcapping": None, "final_logit_softcapping": None},
    ),
    "granite, biases": ("granite", {"attention_bias": True, "mlp_bias": True, "attention_multiplier": 0.3}),
    "olmo2, biases": ("olmo2", {"attention_bias": True, "tie_word_embeddings": True}),
    "olmo3, scaled": (
        "olmo3",
        {
            "sliding_window": 4,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention", "full_attention"],
            "rope_parameters": {
                "full_attention": {
                    "rope_type": "yarn",
                    "rope_theta": 5e5,
                    "factor": 4.0,
                    "original_max_position_embeddings": 16,
                },
                "sliding_attention": {"rope_type": "default", "rope_theta": 5e5},
            },
        },
    ),
    "exaone4, windows": ("exaone4", {"sliding_window": 4, "sliding_window_pattern": 2, "tie_word_embeddings": True}),
    "exaone4, scaled": (
        "exaone4",
        {
            "sliding_window": None,
            "layer_types": ["full_attention"] * 4,
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 1e6,
                "factor": 4.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 16,
            },
        },
    ),
    "qwen3_moe, window and biases": (
        "qwen3_moe",
        _EXPERTS
        | {"use_sliding_window": True, "sliding_window": 4, "attention_bias": True, "tie_word_embeddings": True},
    ),
    "ministral3, window": (
        "ministral3",
        {"sliding_window": 4, "rope_parameters": {**_YARN, "llama_4_scaling_beta": 0.1}},
    ),
}


def config_of(name: str, **overrides: Any) -> Any:
    """The config of a family or a variant."""
    model_type, settings = (FAMILIES | VARIANTS)[name]
    return AutoConfig.for_model(model_type, **(SIZES | settings | overrides))


def save_families(root: Path, names: Iterable[str], tokenizer: Callable[[Path], None] | None = None) -> dict[str, Path]:
    """The folder of each family, with a tokenizer where `tokenizer` writes one there."""
    made = {name: save_family(root / str(i), name) for i, name in enumerate(names)}
    for folder in made.values():
        if tokenizer is not None:
            tokenizer(folder)
    return made


def save_family(folder: Path, name: str, *, seed: int = 0, **overrides: Any) -> Path:
    """A tiny seeded model of a family or a variant, saved as a Hugging Face folder."""
    torch.manual_seed(seed)
    filled(AutoModelForCausalLM.from_config(config_of(name, **overrides), dtype=torch.float32)).save_pretrained(folder)
    return folder
