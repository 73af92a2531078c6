"""What the cost model sees of a model: how many blocks, heads, neurons and cached tokens it has."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Literal, NamedTuple

from amoeba_export.ir import Architecture, DenseArchitecture

Phase = Literal["decode", "prefill"]

TOKENS_UNIT = 128
"""Token counts enter in this unit, so that every coefficient is a few milliseconds or less."""

BEYOND = "beyond_knee"
"""The term of the weights above a knee: each costs more once they no longer fit the device's cache."""


class Counts(NamedTuple):
    """What one layer keeps. Biases and norms are not told apart: they cost nothing that can be measured.

    Attributes:
        window: Tokens that it attends to at most; 0 for all.
    """

    num_heads: int
    num_kv_heads: int
    ffn_size: int
    window: int = 0


def counts_of(dense: DenseArchitecture) -> tuple[Counts, ...]:
    """What each layer of `dense` keeps."""
    windows = [kind.window or 0 for kind in dense.base.layer_kinds]
    return tuple(
        Counts(layer.num_heads, layer.num_kv_heads, layer.ffn_size, windows[layer.kind]) for layer in dense.layers
    )


def dims_of(architecture: Architecture) -> dict[str, int]:
    """The dims that decide speed: two models that share them share a cost table."""
    kinds = architecture.layer_kinds
    windows = Counter(kinds[architecture.kind_index(layer)].window for layer in range(architecture.num_layers))
    return {
        "num_layers": architecture.num_layers,
        "hidden_size": architecture.hidden_size,
        "num_heads": architecture.num_heads,
        "num_kv_heads": architecture.num_kv_heads,
        "head_dim": architecture.head_dim,
        "ffn_size": architecture.ffn_size,
        "vocab_size": architecture.vocab_size,
        "tied_embeddings": int(architecture.tied_embeddings),
        "qkv_bias": int(architecture.qkv_bias),
        "qk_norm": int(architecture.qk_norm),
        **({"head_rows": architecture.head_rows} if architecture.head_rows else {}),
        **_expert_dims(architecture),
        **{f"layers_of_window_{window}": count for window, count in windows.items() if window},
    }


def _expert_dims(architecture: Architecture) -> dict[str, int]:
    if architecture.expert_size is None:
        return {}
    return {"expert_size": architecture.expert_size, "experts_per_token": architecture.experts_per_token}


def features(layers: Iterable[Counts], dims: Mapping[str, int], phase: Phase, tokens: int) -> dict[str, float]:
    """The terms of t(plan) = t0 + sum over layers of [c + attn(q, kv, L) + mlp(f)], each to be given a cost in ms.

    `c` is split over the attention and the FFN block, so that a layer without one of them is cheaper. Heads and neurons
    count as shares of the uncut layer's, tokens in units of 128. A layer with a window has no more tokens in its cache
    and its scores than the window has.

    decode, with L cached tokens: weights are read once per token (`query_heads`, `kv_heads`, `ffn`), the cache grows
    with L (`kv_cache`) and so do the scores (`scores`).
    prefill, with T prompt tokens: weights work T times, scores T * T times; the vocabulary (`tokens`) and what lies
    between the matrices of a block (`attention_tokens`, `ffn_tokens`) may grow with T, too.
    With experts, `ffn` counts those that a token goes through, and `experts` those that are stored: a prompt reads them
    all, and a router scores them all.
    Terms that differ in the power of L or T alone can be told apart only if several token counts were measured.
    """
    num_attention = num_ffn = sum_heads = sum_kv = sum_ffn = stored = 0
    active = dims.get("experts_per_token", dims["ffn_size"])
    heads_by_window: Counter[int] = Counter()
    kv_by_window: Counter[int] = Counter()
    for layer in layers:
        num_attention += layer.num_heads > 0
        num_ffn += layer.ffn_size > 0
        sum_heads += layer.num_heads
        sum_kv += layer.num_kv_heads
        sum_ffn += min(layer.ffn_size, active)
        stored += layer.ffn_size
        heads_by_window[layer.window] += layer.num_heads
        kv_by_window[layer.window] += layer.num_kv_heads
    query, kv, ffn = (
        sum_heads / dims["num_heads"],
        sum_kv / dims["num_kv_heads"],
        sum_ffn / min(active, dims["ffn_size"]),
    )
    length = tokens / TOKENS_UNIT

    def over_seen(counts: Mapping[int, int], whole: int) -> float:
        return sum(
            count / whole * (min(window, tokens) / TOKENS_UNIT if window else length)
            for window, count in counts.items()
        )

    scores = over_seen(heads_by_window, dims["num_heads"])
    blocks = {"base": 1.0, "attention_blocks": float(num_attention), "ffn_blocks": float(num_ffn)}
    if "experts_per_token" in dims:
        blocks["experts"] = stored / dims["ffn_size"]
    if phase == "decode":
        weights = {"query_heads": query, "kv_heads": kv, "ffn": ffn}
        return {**blocks, **weights, "kv_cache": over_seen(kv_by_window, dims["num_kv_heads"]), "scores": scores}
    weights = {"query_heads": query * length, "kv_heads": kv * length, "ffn": ffn * length}
    growing = {"tokens": length, "attention_tokens": num_attention * length, "ffn_tokens": num_ffn * length}
    return {**blocks, **weights, **growing, "scores": scores * length}


def weights_read(layers: Iterable[Counts], dims: Mapping[str, int]) -> float:
    """Weights of the layers that one token goes through, in millions: what a decode step reads, but for the head."""
    hidden, active = dims["hidden_size"], dims.get("experts_per_token", dims["ffn_size"])
    per_head, per_unit = 2 * hidden * dims["head_dim"], 3 * hidden * dims.get("expert_size", 1)
    read = sum(
        per_head * (layer.num_heads + layer.num_kv_heads) + per_unit * min(layer.ffn_size, active) for layer in layers
    )
    return read / 1e6
