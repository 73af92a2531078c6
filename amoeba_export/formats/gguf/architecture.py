"""Which architecture of llama.cpp computes a plan, and what is in the way where none does.

What architectures compute is in `llama_cpp/architectures.py`.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from amoeba_export.errors import NotRepresentable
from amoeba_export.formats.gguf.layout import biased_roles
from amoeba_export.formats.gguf.rope import is_windowed, kinds_of, rope_key, rope_type
from amoeba_export.ir import DenseArchitecture
from amoeba_export.ir.features import Feature, features_of, words_of
from amoeba_export.llama_cpp.architectures import ARCHITECTURES, NOPE_STEP, LlamaCppArchitecture, rotates

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


@dataclass(frozen=True, slots=True)
class _Problem:
    """Why an architecture does not hold a model, and what would help besides other containers."""

    reason: str
    help: tuple[str, ...] = ()


def choose_architecture(dense: DenseArchitecture) -> LlamaCppArchitecture:
    """The architecture to write. Raises `NotRepresentable`, saying what llama.cpp lacks."""
    features, able = _needed_features(dense), able_architectures(dense)
    if not able:
        lacking = words_of(features) or "such norms"
        raise NotRepresentable("GGUF", f"no architecture of llama.cpp has {lacking}", _ELSEWHERE)
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
    kinds, needed = kinds_of(dense), features_of(dense.base)
    if len({(kind.rope is None, rope_key(kind.rope), is_windowed(kind, dense)) for kind in kinds}) == 1:
        needed -= {"layer_kinds"}
    return needed - {"no_rope"} if all(kind.rope is not None for kind in kinds) else needed


def _problem(architecture: LlamaCppArchitecture, dense: DenseArchitecture) -> _Problem | None:
    """The first thing that is in the way of writing `dense` so."""
    base = dense.base
    checks = (_rope_problem, _kinds_problem, _layers_problem, _scales_problem, _experts_problem, _widths_problem)
    for check in (*checks, _bias_problem):
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
    windows = {kind.window for kind in kinds if is_windowed(kind, dense)}
    if architecture.kinds != "listed" and windows:
        (window, *_) = sorted(window for window in windows if window)
        return _Problem(
            f"llama.cpp has no attention window here, and this model one of {window} tokens",
            (f"max_position_embeddings = {window} in its config.json, for texts that the window spans",),
        )
    if architecture.kinds == "listed":
        if len(windows) > 1:
            return _Problem("llama.cpp has one window for all layers that have one")
        local = {rope_key(kind.rope) for kind in kinds if is_windowed(kind, dense)}
        if any(scaled for _, scaled in local) or len(local) > 1:
            return _Problem("llama.cpp scales no RoPE of layers with a window")
        if architecture.one_base and len({kind.rope.theta for kind in kinds if kind.rope}) > 1:
            return _Problem("llama.cpp has one base of RoPE for all layers here")
        if len({rope_key(kind.rope) for kind in kinds if not is_windowed(kind, dense)}) > 1:
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


def _experts_problem(_: LlamaCppArchitecture, dense: DenseArchitecture) -> _Problem | None:
    if not dense.base.expert_size:
        return None
    if not dense.base.shares_sum_to_one:
        return _Problem("llama.cpp scales the shares of a token's experts to a sum of 1, and this model does not")
    if len({dims.ffn_size for dims in dense.layers}) > 1 or not dense.layers[0].ffn_size:
        return _Problem("llama.cpp has one number of experts for all layers", ("--policy uniform",))
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
