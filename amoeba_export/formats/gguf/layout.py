"""Which architecture of llama.cpp computes a plan, and which tensors its loader expects.

What architectures compute is in `llama_cpp/architectures.py`. `deci` skips a layer without FFN before its attention is
added, ignores the output bias of a layer without attention, and takes the head dim from layer 0. So a removed FFN
becomes `BLOCK` neurons of zeros, the constant that a removed attention leaves joins the FFN bias of the layer before,
and layer 0 always has a head, if need be one of zeros.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from amoeba_export.errors import NotRepresentable
from amoeba_export.ir import DenseArchitecture, LayerDims, LayerKind, Role, Rope
from amoeba_export.ir.family import FEATURE_WORDS, FEATURES, LAYER_ROLES, Feature
from amoeba_export.llama_cpp.architectures import (
    ARCHITECTURES,
    NOPE_STEP,
    LlamaCppArchitecture,
    gguf_place,
    has_window,
    rotates,
    score_scale,
)

BLOCK = 32
"""Weights that share a scale in Q8_0 and Q4_0. Rows of a quantized tensor are multiples of it."""

_ELSEWHERE = ("--format safetensors", "--format onnx")

_YARN_KEYS: Mapping[str, Collection[Any] | None] = {
    "rope_type": None,
    "factor": None,
    "original_max_position_embeddings": None,
    "attention_factor": None,
    "mscale": None,
    "mscale_all_dim": None,
    "beta_fast": (32,),
    "beta_slow": (1,),
    "truncate": (True,),
    "max_position_embeddings": None,
    "llama_4_scaling_beta": None,
}
"""What YaRN may say; None is any value. llama.cpp does not read its betas in most architectures, and computes with
these. The last two are not of YaRN: transformers ignores one, and the other is the temperature of queries."""

_QKV: tuple[Role, ...] = ("q", "k", "v")


@dataclass(frozen=True, slots=True)
class _Problem:
    """Why an architecture does not hold a model, and what would help besides other containers."""

    reason: str
    help: tuple[str, ...] = ()


def choose_architecture(dense: DenseArchitecture) -> LlamaCppArchitecture:
    """The architecture to write. Raises `NotRepresentable`, saying what llama.cpp lacks."""
    features, able = _needed_features(dense), able_architectures(dense)
    if not able:
        words = ", ".join(FEATURE_WORDS[feature] for feature in FEATURES if feature in features)
        raise NotRepresentable("GGUF", f"no architecture of llama.cpp has {words or 'such norms'}", _ELSEWHERE)
    # Each holds more than those before it, so that what the last one lacks, all lack.
    problem: _Problem | None = None
    for one in able:
        problem = _problem(one, dense)
        if problem is None:
            return one
    assert problem is not None
    raise NotRepresentable("GGUF", problem.reason, (*_ELSEWHERE, *problem.help))


def able_architectures(dense: DenseArchitecture) -> list[LlamaCppArchitecture]:
    """Those that compute such layers. What computes more than is needed holds nothing that others do not."""
    features = _needed_features(dense)
    able = [
        one
        for one in ARCHITECTURES.values()
        if features <= one.computes and one.always <= features and one.qk_norm == dense.base.qk_norm
    ]
    return [one for one in able if not any(other.computes < one.computes for other in able)]


def _needed_features(dense: DenseArchitecture) -> frozenset[Feature]:
    """What the layers that are kept need: a cut may have lost all of one kind."""
    kinds, needed = kinds_of(dense), dense.base.features
    if len({(kind.rope is None, rope_key(kind.rope), _is_windowed(kind, dense)) for kind in kinds}) == 1:
        needed -= {"layer_kinds"}
    return needed - {"no_rope"} if all(kind.rope is not None for kind in kinds) else needed


def _problem(architecture: LlamaCppArchitecture, dense: DenseArchitecture) -> _Problem | None:
    """The first thing that is in the way of writing `dense` so."""
    base = dense.base
    for check in (_rope_problem, _kinds_problem, _layers_problem, _scales_problem, _widths_problem, _bias_problem):
        if (problem := check(architecture, dense)) is not None:
            return problem
    if architecture.whole and not (dense.has_whole_layers and base.qkv_bias):
        return _Problem("its layers are cut")
    return None


def _rope_problem(architecture: LlamaCppArchitecture, dense: DenseArchitecture) -> _Problem | None:
    for rope in (kind.rope for kind in kinds_of(dense)):
        if rope is None:
            continue
        kind = rope_type(rope)
        if kind not in ("default", "linear", "yarn", "llama3", "longrope"):
            return _Problem(f"RoPE of type {kind} is not written there")
        if kind != "default" and kind not in architecture.ropes:
            together = " together with QK norms" if architecture.qk_norm else f" in its '{architecture.name}'"
            return _Problem(f"llama.cpp has no {kind} RoPE{together}")
        if kind == "yarn":
            unread = sorted(key for key, value in (rope.scaling or {}).items() if not _is_read(key, value))
            if unread:
                return _Problem(f"llama.cpp's YaRN does not read {', '.join(unread)}")
    return None


def _is_read(key: str, value: Any) -> bool:
    allowed = _YARN_KEYS.get(key, ())
    return value is None or allowed is None or value in allowed


def _kinds_problem(architecture: LlamaCppArchitecture, dense: DenseArchitecture) -> _Problem | None:
    base, kinds = dense.base, kinds_of(dense)
    windows = {kind.window for kind in kinds if _is_windowed(kind, dense)}
    if architecture.kinds != "listed" and windows:
        (window, *_) = sorted(window for window in windows if window)
        return _Problem(
            f"llama.cpp has no attention window here, and this model one of {window} tokens",
            (f"max_position_embeddings = {window} in its config.json, for texts that the window spans",),
        )
    if architecture.kinds == "listed":
        if len(windows) > 1:
            return _Problem("llama.cpp has one window for all layers that have one")
        local = {rope_key(kind.rope) for kind in kinds if _is_windowed(kind, dense)}
        if any(scaled for _, scaled in local) or len(local) > 1:
            return _Problem("llama.cpp scales no RoPE of layers with a window")
        if architecture.one_base and len({kind.rope.theta for kind in kinds if kind.rope}) > 1:
            return _Problem("llama.cpp has one base of RoPE for all layers here")
        if len({rope_key(kind.rope) for kind in kinds if not _is_windowed(kind, dense)}) > 1:
            return _Problem("llama.cpp has one RoPE for all layers without a window")
    if architecture.kinds == "every_fourth":
        wrong = [i for i, kind in enumerate(kinds) if (kind.rope is not None) != rotates(architecture, i)]
        if wrong:
            return _Problem(
                f"llama.cpp rotates all layers but the last of each {NOPE_STEP}, and layer {wrong[0]} of this cut is "
                "of the other kind",
                ("kept layers that keep the order",),
            )
    rule = base.query_temperature
    if rule is not None and rule.length != (base.rope_scaling or {}).get("original_max_position_embeddings"):
        return _Problem("llama.cpp scales queries by the length that YaRN stretches, and this model by another")
    return None


def _layers_problem(architecture: LlamaCppArchitecture, dense: DenseArchitecture) -> _Problem | None:
    if architecture.untied and dense.base.tied_embeddings:
        return _Problem(f"llama.cpp's '{architecture.name}' wants a head that is not tied to the embedding")
    if architecture.hybrid == len(dense.layers):
        return _Problem(
            f"llama.cpp takes a model of {architecture.hybrid} layers for one with windows, which this is not"
        )
    return None


def _scales_problem(architecture: LlamaCppArchitecture, dense: DenseArchitecture) -> _Problem | None:
    base = dense.base
    if "embedding_scale" in architecture.always and not math.isclose(
        base.embedding_scale, base.hidden_size**0.5, rel_tol=1e-6
    ):
        return _Problem(f"llama.cpp multiplies embeddings by {base.hidden_size**0.5:g}, not {base.embedding_scale:g}")
    return None


def _widths_problem(architecture: LlamaCppArchitecture, dense: DenseArchitecture) -> _Problem | None:
    base, layers = dense.base, dense.layers
    whole_blocks = all(dims.num_heads and dims.ffn_size for dims in layers)
    if not architecture.per_layer and not (dense.is_uniform and whole_blocks):
        together = "together with QK norms" if architecture.qk_norm else f"in its '{architecture.name}'"
        return _Problem(f"llama.cpp has no per-layer widths {together}")
    if architecture.square and layers[0].num_heads * base.head_dim != base.hidden_size:
        return _Problem(
            f"llama.cpp's '{architecture.name}' takes heads that span the hidden size, these are "
            f"{layers[0].num_heads} of {base.head_dim} for {base.hidden_size}"
        )
    return None


def _bias_problem(architecture: LlamaCppArchitecture, dense: DenseArchitecture) -> _Problem | None:
    given = {role for dims in dense.layers for role in biased_roles(dims)}
    if given - architecture.biases:
        together = "together with QK norms" if architecture.qk_norm else f"in its '{architecture.name}'"
        return _Problem(f"llama.cpp has no biases {together}", ("a shape of width 1",))
    if architecture.needs - given:
        return _Problem(f"llama.cpp's '{architecture.name}' wants biases")
    return None


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


def kinds_of(dense: DenseArchitecture) -> list[LayerKind]:
    """How each layer attends."""
    return [dense.kind(layer) for layer in dense.layers]


def _is_windowed(kind: LayerKind, dense: DenseArchitecture) -> bool:
    """Whether a window leaves anything out."""
    return kind.window is not None and kind.window < dense.base.max_positions


def window_pattern(architecture: LlamaCppArchitecture, dense: DenseArchitecture) -> tuple[int | None, Any]:
    """The window of layers that have one, and what tells llama.cpp which have it; None where nothing needs be said.

    Its own period is left unsaid and another period is one number: older versions read no list.
    """
    kinds = kinds_of(dense)
    listed = [_is_windowed(kind, dense) for kind in kinds]
    window = next((kind.window for kind in kinds if _is_windowed(kind, dense)), None)
    if window is None:
        return (architecture.window, 1) if architecture.window else (None, None)
    for pattern in (None, *range(len(listed) + 2)):
        if all(has_window(architecture, i, pattern) == is_local for i, is_local in enumerate(listed)):
            return window, pattern
    return window, listed


def global_rope(dense: DenseArchitecture) -> Rope | None:
    """RoPE of layers without a window, or of all where all have one."""
    kinds = sorted(kinds_of(dense), key=lambda kind: _is_windowed(kind, dense))
    return next((kind.rope for kind in kinds if kind.rope is not None), None)


def local_rope(dense: DenseArchitecture) -> Rope | None:
    """RoPE of layers with a window."""
    return next((kind.rope for kind in kinds_of(dense) if _is_windowed(kind, dense)), None)


def rope_type(rope: Rope) -> str:
    """The type that transformers calls a RoPE."""
    return str((rope.scaling or {}).get("rope_type", "default"))


def rope_key(rope: Rope | None) -> tuple[float | None, bool]:
    """The base, and whether it is scaled."""
    return (None, False) if rope is None else (rope.theta, rope.scaling is not None)


def q_factor(architecture: LlamaCppArchitecture, dense: DenseArchitecture) -> float:
    """By what q is multiplied for scores to be scaled as the model does, where a file cannot say how."""
    if architecture.large is None:
        return 1.0
    base = dense.base
    given = score_scale(architecture, len(dense.layers), base.hidden_size, dense.layers[0].num_heads, base.head_dim)
    return base.score_scale / given


def yarn_magnitude(scaling: Mapping[str, Any]) -> float:
    """By what YaRN multiplies sine and cosine, as a share of llama.cpp's own 0.1 ln(factor) + 1."""

    def grown(weight: float) -> float:
        return 1.0 + 0.1 * weight * math.log(max(scaling["factor"], 1.0))

    magnitude = scaling.get("attention_factor")
    if magnitude is None:
        mscale, mscale_all_dim = scaling.get("mscale"), scaling.get("mscale_all_dim")
        magnitude = grown(mscale) / grown(mscale_all_dim) if mscale and mscale_all_dim else grown(1.0)
    return float(magnitude / grown(1.0))


def written_layers(
    dense: DenseArchitecture, architecture: LlamaCppArchitecture, *, quantized: bool
) -> tuple[LayerDims, ...]:
    """The dims that the file says: those of the plan, plus the zeros that llama.cpp or a quantized row needs.

    Neurons and heads of zeros add exactly nothing to the output.
    """
    written = []
    for idx, dims in enumerate(dense.layers):
        ffn_size = dims.ffn_size
        if quantized or not ffn_size:
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
            first = shapes.get(place.tensor, (0,))[0]
            shapes[place.tensor] = (first + shape[0], *shape[1:])
        yield from shapes.items()


def _layer_weights(dense: DenseArchitecture, dims: LayerDims) -> Iterator[tuple[Role, str, tuple[int, ...]]]:
    """Role, part and shape of the weights of a layer."""
    base = dense.base
    hidden, query, kv = base.hidden_size, dims.num_heads * base.head_dim, dims.num_kv_heads * base.head_dim
    rows: Mapping[Role, int] = {"q": query, "k": kv, "v": kv, "o": hidden, "down": hidden}
    columns: Mapping[Role, int] = {"o": query, "down": dims.ffn_size}
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
            if role in norms:
                if is_there and norms[role]:
                    yield role, "weight", (normed.get(role, hidden),)
                continue
            size = rows.get(role, dims.ffn_size)
            if is_there:
                yield role, "weight", (size, columns.get(role, hidden))
            if role in biased and (is_there or role == "o"):
                yield role, "bias", (size,)


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


def longrope_magnitude(rope: Rope, max_positions: int) -> float:
    """By what LongRoPE multiplies sine and cosine (transformers' rule)."""
    scaling = rope.scaling or {}
    if (magnitude := scaling.get("attention_factor")) is not None:
        return float(magnitude)
    original = scaling["original_max_position_embeddings"]
    factor = scaling.get("factor") or max_positions / original
    return 1.0 if factor <= 1.0 else math.sqrt(1 + math.log(factor) / math.log(original))


def permute_pairs(w: torch.Tensor, num_heads: int) -> torch.Tensor:
    """Rows of q or k (weight or bias) from rotating halves to rotating neighbouring pairs, head by head."""
    heads = w.reshape(num_heads, 2, -1, *w.shape[1:])
    return heads.transpose(1, 2).reshape(w.shape)
