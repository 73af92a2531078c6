"""From what calibration knows to one plan: which heads and neurons a shape keeps.

Needs numpy only. U below counts attention *units*: what is kept or dropped as a whole.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

from amoeba_export.errors import InputError, UsageError, WrongModel
from amoeba_export.ir.architecture import Architecture
from amoeba_export.ir.belongs import strategy_differences
from amoeba_export.ir.plan import LayerPlan, Policy, Shape, SubnetPlan, nearest_gate_width
from amoeba_export.ir.strategy import FixedWidth, Importance, Strategy
from amoeba_export.ir.validate import validate

if TYPE_CHECKING:
    from numpy.typing import NDArray

Unit = Literal["kv_group", "query_per_group"]
"""`kv_group`: a KV head with its query heads. `query_per_group`: the r-th best query head of every KV head."""

UPSTREAM_HEAD_WEIGHT = 170.0
"""Neurons that a head counts for upstream: 512/3 for head_dim 128 and MHA, truncated by an int64 tensor."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CutRules:
    """How a width is cut, whatever the shape.

    Attributes:
        policy: How it is spread over layers.
        align: Neuron counts are multiples of this.
        head_multiple: Query heads are multiples of this where units allow it; `adaptive` does not look at it.
        gate_widths: Width choices of a SMoL gate.
        unit: What attention is cut in.
    """

    policy: Policy = "uniform"
    align: int = 1
    head_multiple: int = 1
    gate_widths: tuple[float, ...] = ()
    unit: Unit = "kv_group"


PLAIN = CutRules()
"""Nothing but the shape decides."""


def derive_plan(strategy: Strategy, architecture: Architecture, shape: Shape, rules: CutRules = PLAIN) -> SubnetPlan:
    """The plan of `shape`: the layers that `strategy` keeps at its depth, the best units at its width.

    `uniform`: every layer keeps the same counts. The attention count is the one nearest to the width (ties up, at least
    one unit); neurons then fill up so that the kept share of a layer's prunable weights is nearest to the width, in
    multiples of `align`, at least one multiple. Which ones: the best of each layer.

    `adaptive`: all layers of the supernet compete, as in the paper, so that a layer keeps the same units at every depth
    and the share is met over all layers, not exactly over the kept ones. A layer may keep no head, or no neuron.

    Where heads cannot be cut (`Architecture.cuts_heads`), all stay, and neurons make the width as far as they can.

    Removed channels are replaced by their mean, but for `wanda` importances, which know no such thing.

    An upstream import supplies masks, not scores: it decides the policy, and of the rules only `gate_widths` apply.

    Raises:
        WrongModel: The strategy has other dims than `architecture`.
        UsageError: A depth or width that the strategy does not know.
        InputError: The strategy makes a plan that breaks the rules of `validate`.
    """
    policy, align = rules.policy, architecture.ffn_align(rules.align)
    if differences := strategy_differences(strategy, architecture):
        raise WrongModel("The strategy", differences)
    kept = _kept_layers(strategy, shape)
    width_key = None
    if shape.width == 1.0 and not any(_same(width, 1.0) for width in strategy.widths):
        masks = _everything(architecture)
    elif strategy.importance is None:
        width_key, fixed = _listed_width(strategy, shape.width)
        masks = _Masks(fixed.heads_LN, fixed.ffn_LF)
    elif policy == "uniform":
        masks = _uniform(strategy.importance, architecture, shape.width, align, rules.head_multiple, rules.unit)
    else:
        masks = _adaptive(strategy.importance, architecture, shape.width, align, rules.unit)
    layers = tuple(_layer_plan(masks, layer, architecture) for layer in kept)
    if strategy.importance is None:
        policy = "uniform" if len({layer.counts for layer in layers}) == 1 else "adaptive"
    plan = SubnetPlan(
        shape=shape,
        policy=policy,
        layers=layers,
        width_key=width_key,
        compensate=strategy.compensation != "none",
        gate_width=nearest_gate_width(rules.gate_widths, shape.width),
        strategy_id=strategy.identity,
        model_id=strategy.model_id,
    )
    validate(plan, architecture)
    return plan


def flap_threshold(
    heads_LU: NDArray[np.floating],
    ffn_LF: NDArray[np.floating],
    width: float,
    *,
    head_weight: float | NDArray[np.floating],
    upstream: bool = False,
) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """FLAP's one threshold for the units and neurons of all layers (upstream `width_shrink/prune.py`, `AL-AM`).

    Units and neurons are sorted by standardised score, best first; those are kept whose summed weight is nearest to
    `width` of the whole, a unit weighing `head_weight` neurons.

    Args:
        heads_LU: Score of each attention unit. [L, U].
        ffn_LF: Score of each neuron. [L, F].
        width: Share to keep, above 0 and at most 1.
        head_weight: Neurons that a unit counts for; one number, or one per unit of a layer [U].
        upstream: Keep only what is *above* the score of the last kept one, as the published code does: one unit fewer,
            even at width 1. `UPSTREAM_HEAD_WEIGHT` is its `head_weight`.

    Returns:
        The kept units [L, U] and neurons [L, F].
    """
    scores = np.concatenate([heads_LU.ravel(), ffn_LF.ravel()])
    order = np.argsort(-scores, kind="stable")
    weights = np.concatenate([np.broadcast_to(head_weight, heads_LU.shape).ravel(), np.ones(ffn_LF.size)])[order]
    last = int(np.argmin(np.abs(np.cumsum(weights) - weights.sum() * width)))
    if upstream:
        threshold = scores[order[last]]
        return heads_LU > threshold, ffn_LF > threshold
    kept = np.zeros(scores.size, dtype=bool)
    kept[order[: last + 1]] = True
    return kept[: heads_LU.size].reshape(heads_LU.shape), kept[heads_LU.size :].reshape(ffn_LF.shape)


@dataclass(frozen=True, slots=True)
class _Masks:
    """Kept query heads [L, N] and neurons [L, F] of every layer."""

    heads_LN: NDArray[np.bool_]
    ffn_LF: NDArray[np.bool_]


def _kept_layers(strategy: Strategy, shape: Shape) -> list[int]:
    active = strategy.depth.get(strategy.num_layers - shape.depth)
    if active is None:
        depths = sorted(strategy.num_layers - removed for removed in strategy.depth)
        raise UsageError(
            f"The strategy does not know depth {shape.depth}.",
            next_step=f"Choose one of {', '.join(map(str, depths))}, or calibrate with more removed layers.",
        )
    return [layer for layer, keep in enumerate(active) if keep]


def _same(width: float, other: float) -> bool:
    return abs(width - other) < 1e-6


def _listed_width(strategy: Strategy, width: float) -> tuple[float, FixedWidth]:
    """An imported strategy knows the widths it lists, and 1."""
    for listed, fixed in strategy.widths.items():
        if _same(listed, width):
            return listed, fixed
    if not strategy.widths:
        raise InputError(
            f"The strategy cannot make width {width:g}: it has neither importances nor masks.",
            next_step="Use width 1, or calibrate a strategy of your own with 'amoeba calibrate'.",
        )
    widths = sorted({*strategy.widths, 1.0}, reverse=True)
    raise UsageError(
        f"The strategy does not know width {width:g}: it was imported, with masks of its own widths only.",
        next_step=f"Choose one of: {', '.join(f'{known:g}' for known in widths)}; or make a strategy of your own with "
        "'amoeba calibrate', which knows every width.",
    )


def _everything(architecture: Architecture) -> _Masks:
    layers = architecture.num_layers
    return _Masks(
        np.ones((layers, architecture.num_heads), dtype=bool), np.ones((layers, architecture.ffn_size), dtype=bool)
    )


def _units(
    importance: Importance, architecture: Architecture, unit: Unit
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Score of each attention unit [L, U], and how many weights it adds to the better units of its layer [U]."""
    heads_LKG = importance.heads_LN.reshape(-1, architecture.num_kv_heads, architecture.heads_per_kv)
    if unit == "kv_group":
        params = architecture.heads_per_kv * architecture.query_head_params + architecture.kv_head_params
        return heads_LKG.mean(axis=2), np.full(architecture.num_kv_heads, float(params))
    ranked_LKG = -np.sort(-heads_LKG, axis=2)
    params_U = np.full(architecture.heads_per_kv, float(architecture.num_kv_heads * architecture.query_head_params))
    params_U[0] += architecture.num_kv_heads * architecture.kv_head_params  # the KV heads come with the first
    return ranked_LKG.mean(axis=1), params_U


def _heads(
    units_LU: NDArray[np.bool_], importance: Importance, architecture: Architecture, unit: Unit
) -> NDArray[np.bool_]:
    """Query heads [L, N] of the kept units [L, U]."""
    if unit == "kv_group":
        return np.repeat(units_LU, architecture.heads_per_kv, axis=1)
    heads_LKG = importance.heads_LN.reshape(-1, architecture.num_kv_heads, architecture.heads_per_kv)
    rank_LKG = np.argsort(np.argsort(-heads_LKG, axis=2, kind="stable"), axis=2)
    kept_LKG = np.take_along_axis(np.repeat(units_LU[:, None, :], architecture.num_kv_heads, axis=1), rank_LKG, axis=2)
    return kept_LKG.reshape(units_LU.shape[0], -1)


def _best(scores_LX: NDArray[np.float64], count: int) -> NDArray[np.bool_]:
    """The `count` best of each row; the lower index wins a tie."""
    order_LX = np.argsort(-scores_LX, axis=1, kind="stable")
    kept_LX = np.zeros(scores_LX.shape, dtype=bool)
    np.put_along_axis(kept_LX, order_LX[:, :count], True, axis=1)
    return kept_LX


def _round_half_up(value: float) -> int:
    return int(np.floor(value + 0.5 + 1e-9))


def _aligned(count: float, align: int, size: int, *, least: int) -> int:
    """The multiple of `align` nearest to `count`, at least `least` multiples; `size` itself is always allowed."""
    multiple = max(_round_half_up(count / align), least) * align
    if multiple > size or abs(size - count) < abs(multiple - count):
        return size
    return multiple


def _uniform(
    importance: Importance, architecture: Architecture, width: float, align: int, head_multiple: int, unit: Unit
) -> _Masks:
    units_LU, params_U = _units(importance, architecture, unit)
    whole = units_LU.shape[1]
    allowed = [count for count in range(1, whole + 1) if count * architecture.num_heads // whole % head_multiple == 0]
    if not architecture.cuts_heads:
        allowed = [whole]
    num_units = min(allowed or range(1, whole + 1), key=lambda count: (round(abs(count - whole * width), 9), -count))
    ffn_params = architecture.prunable_params() * width - params_U[:num_units].sum()
    num_neurons = _aligned(ffn_params / architecture.unit_params, align, architecture.ffn_size, least=1)
    return _Masks(
        _heads(_best(units_LU, num_units), importance, architecture, unit), _best(importance.ffn_LF, num_neurons)
    )


def _adaptive(importance: Importance, architecture: Architecture, width: float, align: int, unit: Unit) -> _Masks:
    units_LU, params_U = _units(importance, architecture, unit)
    if not architecture.cuts_heads:
        units_LU = np.full_like(units_LU, np.inf)
    kept_LU, kept_LF = flap_threshold(
        units_LU, importance.ffn_LF, width, head_weight=params_U / architecture.unit_params
    )
    counts = [_aligned(count, align, architecture.ffn_size, least=0) for count in kept_LF.sum(axis=1)]
    ffn_LF = np.concatenate([_best(row[None], count) for row, count in zip(importance.ffn_LF, counts, strict=True)])
    if not architecture.cuts_heads:
        kept_LU = np.ones_like(kept_LU)
    return _Masks(_heads(kept_LU, importance, architecture, unit), ffn_LF)


def _layer_plan(masks: _Masks, layer: int, architecture: Architecture) -> LayerPlan:
    query_heads = tuple(map(int, np.flatnonzero(masks.heads_LN[layer])))
    return LayerPlan(
        source_layer=layer,
        query_heads=query_heads,
        kv_heads=tuple(sorted({head // architecture.heads_per_kv for head in query_heads})),
        ffn=tuple(map(int, np.flatnonzero(masks.ffn_LF[layer]))),
    )
