"""What computes a model must know beyond Llama's layer with biases, one window, and norms of q and k per head."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

from amoeba_export.ir.architecture import Architecture

Feature = Literal[
    "norm_offset",
    "output_norms",
    "no_input_norms",
    "activation",
    "attention_scale",
    "attention_softcap",
    "final_softcap",
    "whole_qk_norm",
    "partial_rotary",
    "layer_kinds",
    "no_rope",
    "embedding_scale",
    "residual_scale",
    "logits_divisor",
    "query_temperature",
    "experts",
]


@dataclass(frozen=True, slots=True)
class _Known:
    """What messages call a feature, and whether a model has it."""

    words: str
    is_needed: Callable[[Architecture], bool]


_FEATURES: Mapping[Feature, _Known] = {
    "norm_offset": _Known("norms that multiply by 1 + weight", lambda model: model.norm_offset != 0.0),
    "output_norms": _Known("norms after its blocks", lambda model: model.output_norms),
    "no_input_norms": _Known("no norms before its blocks", lambda model: not model.input_norms),
    "activation": _Known("another activation than SiLU", lambda model: model.activation != "silu"),
    "attention_scale": _Known(
        "an attention scale that is not head_dim ** -0.5", lambda model: model.score_scale != model.head_dim**-0.5
    ),
    "attention_softcap": _Known("a soft cap on attention scores", lambda model: model.attention_softcap is not None),
    "final_softcap": _Known("a soft cap on logits", lambda model: model.final_softcap is not None),
    "whole_qk_norm": _Known("norms over all heads of q and k", lambda model: not model.cuts_heads),
    "partial_rotary": _Known(
        "RoPE over a part of each head",
        lambda model: any(kind.rope is not None and kind.rope.dims != model.head_dim for kind in model.layer_kinds),
    ),
    "layer_kinds": _Known("layers that attend in different ways", lambda model: len(model.layer_kinds) > 1),
    "no_rope": _Known("layers without RoPE", lambda model: any(kind.rope is None for kind in model.layer_kinds)),
    "embedding_scale": _Known("scaled embeddings", lambda model: model.embedding_scale != 1.0),
    "residual_scale": _Known("scaled residual branches", lambda model: model.residual_scale != 1.0),
    "logits_divisor": _Known("scaled logits", lambda model: model.logits_divisor != 1.0),
    "query_temperature": _Known("queries scaled by their position", lambda model: model.query_temperature is not None),
    "experts": _Known("experts that a router picks", lambda model: model.expert_size is not None),
}


def features_of(model: Architecture) -> frozenset[Feature]:
    """Those that `model` has; none for Llama's layer."""
    return frozenset(feature for feature, known in _FEATURES.items() if known.is_needed(model))


def words_of(features: frozenset[Feature]) -> str:
    """Features in words, in one order."""
    return ", ".join(known.words for feature, known in _FEATURES.items() if feature in features)
