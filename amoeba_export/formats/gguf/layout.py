"""Which tensors llama.cpp's loader expects of a plan, and how their rows lie.

`deci` skips a layer without FFN before its attention is added, ignores the output bias of a layer without attention,
and takes the head dim from layer 0. So a removed FFN becomes `BLOCK` neurons of zeros, the constant that a removed
attention leaves joins the FFN bias of the layer before, and layer 0 always has a head, if need be one of zeros.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence

import torch

from amoeba_export.formats.gguf.rope import rope_factors
from amoeba_export.ir import DenseArchitecture, LayerDims, Role
from amoeba_export.ir.family import LAYER_ROLES
from amoeba_export.llama_cpp.architectures import MATRICES_OF_EXPERTS, LlamaCppArchitecture, gguf_place, score_scale

BLOCK = 32
"""Weights that share a scale in Q8_0 and Q4_0. Rows of a quantized tensor are multiples of it."""

_QKV: tuple[Role, ...] = ("q", "k", "v")


def biased_roles(dims: LayerDims) -> set[Role]:
    """Roles that have a bias in a layer."""
    roles: set[Role] = set(_QKV) if dims.qkv_bias else set()
    if dims.gate_up_bias:
        roles |= {"gate", "up"}
    if dims.o_bias:
        roles.add("o")
    if dims.down_bias:
        roles.add("down")
    return roles


def written_layers(
    dense: DenseArchitecture, architecture: LlamaCppArchitecture, *, quantized: bool
) -> tuple[LayerDims, ...]:
    """The dims that the file says: those of the plan, plus the zeros that llama.cpp or a quantized row needs.

    Neurons and heads of zeros add exactly nothing to the output.
    """
    written = []
    for idx, dims in enumerate(dense.layers):
        ffn_size = dims.ffn_size
        if (quantized or not ffn_size) and not dense.base.expert_size:
            ffn_size = max(-(-ffn_size // BLOCK), 1) * BLOCK
        layer = dataclasses.replace(dims, ffn_size=ffn_size)
        if architecture.per_layer:
            # Constants of later layers without attention may land in any FFN bias.
            follower = dense.layers[idx + 1] if idx + 1 < len(dense.layers) else None
            if follower is not None and not follower.num_heads and follower.o_bias:
                layer = dataclasses.replace(layer, down_bias=True)
            if not dims.num_heads and idx == 0:
                layer = dataclasses.replace(layer, num_heads=1, num_kv_heads=1)
            elif not dims.num_heads:
                layer = dataclasses.replace(layer, o_bias=False, qkv_bias=False)
        written.append(layer)
    return tuple(written)


def expected_tensors(
    dense: DenseArchitecture, architecture: LlamaCppArchitecture, layers: Sequence[LayerDims]
) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Name and shape (as in torch) of every tensor in the file, in file order."""
    base = dense.base
    outside: tuple[Role, ...] = ("embedding", "final_norm", "head")
    for role in outside:
        if role != "head" or not base.tied_embeddings:
            rows = () if role == "final_norm" else (base.vocab_size,)
            yield gguf_place(architecture, role, None, "weight").tensor, (*rows, base.hidden_size)
    for name, factors in rope_factors(dense).items():
        yield name, tuple(factors.shape)
    for idx, dims in enumerate(layers):
        shapes: dict[str, tuple[int, ...]] = {}
        for role, part, shape in _layer_weights(dense, dims):
            place = gguf_place(architecture, role, idx, part)
            first = shapes.get(place.tensor, (0,))[0] if len(place.roles) > 1 else 0
            shapes[place.tensor] = (first + shape[0], *shape[1:])
        yield from shapes.items()


def _layer_weights(dense: DenseArchitecture, dims: LayerDims) -> Iterator[tuple[Role, str, tuple[int, ...]]]:
    """Role, part and shape of the weights of a layer."""
    base = dense.base
    hidden, query, kv = base.hidden_size, dims.num_heads * base.head_dim, dims.num_kv_heads * base.head_dim
    inner = base.expert_size or dims.ffn_size
    rows: Mapping[Role, int] = {"q": query, "k": kv, "v": kv, "o": hidden, "down": hidden, "router": dims.ffn_size}
    columns: Mapping[Role, int] = {"o": query, "down": inner}
    norms: Mapping[Role, bool] = {
        "attn_in_norm": base.input_norms,
        "ffn_in_norm": base.input_norms,
        "attn_out_norm": base.output_norms,
        "ffn_out_norm": base.output_norms,
        "q_norm": base.qk_norm,
        "k_norm": base.qk_norm,
    }
    whole = base.qk_norm_scope == "whole"
    normed: Mapping[Role, int] = {
        "q_norm": query if whole else base.head_dim,
        "k_norm": kv if whole else base.head_dim,
    }
    biased = biased_roles(dims)
    for block, roles in LAYER_ROLES.items():
        is_there = block == "ffn" or bool(query)  # an FFN is always written
        for role in roles:
            if role == "router" and not base.expert_size:
                continue
            if role in norms:
                if is_there and norms[role]:
                    yield role, "weight", (normed.get(role, hidden),)
                continue
            size = rows.get(role, inner)
            experts = (dims.ffn_size,) if base.expert_size and role in MATRICES_OF_EXPERTS else ()
            if is_there:
                yield role, "weight", (*experts, size, columns.get(role, hidden))
            if role in biased and (is_there or role == "o"):
                yield role, "bias", (size,)


def q_factor(architecture: LlamaCppArchitecture, dense: DenseArchitecture) -> float:
    """By what q is multiplied for scores to be scaled as the model does, where a file cannot say how."""
    if architecture.large is None:
        return 1.0
    base = dense.base
    given = score_scale(architecture, len(dense.layers), base.hidden_size, dense.layers[0].num_heads, base.head_dim)
    return base.score_scale / given


def expert_after_expert(w_DF: torch.Tensor, num_experts: int) -> torch.Tensor:
    """`down`, from the columns of all experts side by side to the rows of one expert under those of another."""
    return w_DF.reshape(w_DF.shape[0], num_experts, -1).transpose(0, 1).reshape(num_experts * w_DF.shape[0], -1)


def permute_pairs(w: torch.Tensor, num_heads: int) -> torch.Tensor:
    """Rows of q or k (weight or bias) from rotating halves to rotating neighbouring pairs, head by head."""
    heads = w.reshape(num_heads, 2, -1, *w.shape[1:])
    return heads.transpose(1, 2).reshape(w.shape)
