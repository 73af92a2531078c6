"""What the cost model sees of a model: how many blocks, heads, neurons and cached tokens it has."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Literal, NamedTuple

from amoeba_export.ir import Architecture, DenseArchitecture

Phase = Literal["decode", "prefill"]

TOKENS_UNIT = 128
"""Token counts enter in this unit, so that every coefficient is a few milliseconds or less."""


class Counts(NamedTuple):
    """What one layer keeps. Biases and norms are not told apart: they cost nothing that can be measured."""

    num_heads: int
    num_kv_heads: int
    ffn_size: int


def counts_of(dense: DenseArchitecture) -> tuple[Counts, ...]:
    """What each layer of `dense` keeps."""
    return tuple(Counts(layer.num_heads, layer.num_kv_heads, layer.ffn_size) for layer in dense.layers)


def dims_of(architecture: Architecture) -> dict[str, int]:
    """The dims that decide speed: two models that share them share a cost table."""
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
    }


def features(layers: Iterable[Counts], dims: Mapping[str, int], phase: Phase, tokens: int) -> dict[str, float]:
    """The terms of t(plan) = t0 + sum over layers of [c + attn(q, kv, L) + mlp(f)], each to be given a cost in ms.

    `c` is split over the attention and the FFN block, so that a layer without one of them is cheaper. Heads and neurons
    count as shares of the uncut layer's, tokens in units of 128.

    decode, with L cached tokens: weights are read once per token (`query_heads`, `kv_heads`, `ffn`), the cache grows
    with L (`kv_cache`) and so do the scores (`scores`).
    prefill, with T prompt tokens: weights work T times, scores T * T times; the vocabulary (`tokens`) and what lies
    between the matrices of a block (`attention_tokens`, `ffn_tokens`) may grow with T, too.
    Terms that differ in the power of L or T alone can be told apart only if several token counts were measured.
    """
    num_attention = num_ffn = sum_heads = sum_kv = sum_ffn = 0
    for layer in layers:
        num_attention += layer.num_heads > 0
        num_ffn += layer.ffn_size > 0
        sum_heads += layer.num_heads
        sum_kv += layer.num_kv_heads
        sum_ffn += layer.ffn_size
    query, kv, ffn = sum_heads / dims["num_heads"], sum_kv / dims["num_kv_heads"], sum_ffn / dims["ffn_size"]
    length = tokens / TOKENS_UNIT
    blocks = {"base": 1.0, "attention_blocks": float(num_attention), "ffn_blocks": float(num_ffn)}
    if phase == "decode":
        weights = {"query_heads": query, "kv_heads": kv, "ffn": ffn}
        return {**blocks, **weights, "kv_cache": kv * length, "scores": query * length}
    weights = {"query_heads": query * length, "kv_heads": kv * length, "ffn": ffn * length}
    growing = {"tokens": length, "attention_tokens": num_attention * length, "ffn_tokens": num_ffn * length}
    return {**blocks, **weights, **growing, "scores": query * length * length}
