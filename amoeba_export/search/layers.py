"""The `layers` space: every kept layer gets its own heads and neurons, the best that the budget buys."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from amoeba_export.ir import Architecture, DenseArchitecture, Metric, Shape, Strategy, SubnetPlan, validate
from amoeba_export.ir.dense import Compensation
from amoeba_export.ir.derive import CutRules, derive_plan
from amoeba_export.ir.plan import nearest_gate_width
from amoeba_export.search.importance import Retained
from amoeba_export.search.knapsack import solve_knapsack
from amoeba_export.search.predict import Corrected
from amoeba_export.search.space import Limits, Sketch
from amoeba_export.search.surface import quality_surface

NUM_FFN_OPTIONS = 32
"""Neuron counts that a layer may have, evenly spaced, besides none."""

CAPACITIES = (1.0, 0.995, 0.99, 0.98, 0.96, 0.94, 0.92, 0.9, 0.85, 0.8, 0.7, 0.6)
"""Shares of the budget for which a depth's solution is listed: one knapsack solves them all."""

FloatArray = NDArray[np.float64]


class LayerCounts(NamedTuple):
    """What one kept layer is to keep."""

    source_layer: int
    num_heads: int
    num_kv_heads: int
    ffn_size: int


@dataclass(frozen=True, slots=True)
class _Constraint:
    """A limit, and what a model takes of it before correction: a sum over blocks, or nearly so."""

    cost: Callable[[DenseArchitecture], float]
    limit: float


def layers_sketches(
    strategy: Strategy,
    architecture: Architecture,
    rules: CutRules,
    predictor: Corrected,
    limits: Limits,
) -> list[Sketch]:
    """For every depth of the strategy: the per-layer heads and neurons that retain most under the limits.

    The layers of a depth are those of the strategy's depth order. Each has a class of attention options (any number of
    KV heads, any number of query heads on each, or none) and a class of FFN options; an option's value is what it
    retains of its block's importance, its cost the predicted difference that it makes. The multiple-choice knapsack
    over all classes is solved by dynamic programming: exact, up to 1/4096 of the budget per block, under one limit.
    Under several, mixtures of them are solved one after another, a bound that is tight where one limit rules.

    The estimate of quality is on the grid's scale: a plan is taken to be as good as the grid's shape of the same depth
    that retains as much, which makes the estimate exact for every shape that was measured. A plan that retains less
    than every measured shape of its depth is left out.
    """
    assert strategy.importance is not None, "an upstream import has masks, not importances"
    retained = Retained.of(strategy.importance, architecture)
    measured = CutRules(policy="adaptive" if strategy.policy == "adaptive" else "uniform")
    surface = quality_surface(
        strategy,
        coordinate=lambda shape: retained.share(derive_plan(strategy, architecture, shape, measured)),
    )
    options = _LayerChoices(architecture, rules.align, strategy.compensation)
    constraints = _constraints(predictor, limits, architecture.uncut)
    sketches = []
    for _, active in sorted(strategy.depth.items()):
        kept = [layer for layer, keep in enumerate(active) if keep]
        for layers, share in _solutions(kept, retained, options, constraints):
            quality = surface.at(len(kept), share)
            if quality is None:
                continue
            dense = options.dense(layers)
            sketches.append(
                Sketch(
                    shape=_shape(dense),
                    policy="adaptive",
                    dense=dense,
                    quality=quality,
                    make_plan=partial(_plan, strategy, architecture, retained, layers, rules.gate_widths),
                )
            )
    return sketches


class _Costs(NamedTuple):
    """Of empty layers, of each attention option of each layer, and of each FFN option of any."""

    base: float
    attention: list[FloatArray]
    ffn: FloatArray


class _LayerChoices:
    """What a layer of `architecture` may keep."""

    def __init__(self, architecture: Architecture, align: int, compensation: Compensation) -> None:
        self._architecture = architecture
        self._compensation = compensation
        per_group = range(1, architecture.heads_per_kv + 1)
        groups = range(1, architecture.num_kv_heads + 1)
        every = [(kv * each, kv) for kv in groups for each in per_group]
        self.attention = [(0, 0), *(every if architecture.cuts_heads else every[-1:])]
        align, size = architecture.ffn_align(align), architecture.ffn_size
        step = max(1, -(-size // (NUM_FFN_OPTIONS * align))) * align
        self.ffn = [*range(0, size, step), size]

    def dense(self, layers: Sequence[LayerCounts]) -> DenseArchitecture:
        """The dims of a model with these layers, biases included."""
        base = self._architecture
        dims = tuple(
            base.cut_layer(
                one.num_heads,
                one.num_kv_heads,
                one.ffn_size,
                compensation=self._compensation,
                kind=base.kind_index(one.source_layer),
            )
            for one in layers
        )
        return DenseArchitecture(base=base, layers=dims)

    def costs(self, cost: Callable[[DenseArchitecture], float], kept: Sequence[int]) -> _Costs:
        """What each option adds to the layers `kept`. What attention adds depends on how its layer attends."""
        empty = [LayerCounts(layer, 0, 0, 0) for layer in kept]
        base, (first, *rest) = cost(self.dense(empty)), empty
        ffn = [cost(self.dense([first._replace(ffn_size=size), *rest])) - base for size in self.ffn]
        attention: dict[int, FloatArray] = {}
        for i, layer in enumerate(kept):
            kind = self._architecture.kind_index(layer)
            if kind not in attention:
                layers = [LayerCounts(layer, heads, kv, 0) for heads, kv in self.attention]
                added = [cost(self.dense([*empty[:i], one, *empty[i + 1 :]])) - base for one in layers]
                attention[kind] = np.array(added)
        by_layer = [attention[self._architecture.kind_index(layer)] for layer in kept]
        return _Costs(base, by_layer, np.array(ffn))


def _constraints(predictor: Corrected, limits: Limits, uncut: DenseArchitecture) -> list[_Constraint]:
    """One for each sum: the largest of several is within a limit where each of them is."""
    constraints = []
    for budget, limit_ms in limits.budgets:
        metric, percentile = budget.metric, budget.percentile
        limit = predictor.raw_limit((1 - limits.margin) * limit_ms, metric, percentile)

        def piece(dense: DenseArchitecture, i: int, metric: Metric = metric, percentile: int = percentile) -> float:
            return predictor.pieces(dense, metric, percentile)[i]

        for i in range(len(predictor.pieces(uncut, metric, percentile))):
            constraints.append(_Constraint(partial(piece, i=i), limit))
    if limits.memory_mb is not None and limits.memory_limit_mb is not None:
        constraints.append(_Constraint(limits.memory_mb, limits.memory_limit_mb))
    return constraints


def _mixtures(num_constraints: int) -> list[tuple[float, ...]]:
    """Weights under which several limits become one: each alone, all alike, and every pair in between."""
    if num_constraints == 1:
        return [(1.0,)]
    alone = [tuple(float(i == k) for i in range(num_constraints)) for k in range(num_constraints)]
    mixed = [
        tuple(share * a + (1 - share) * b for a, b in zip(alone[i], alone[k], strict=True))
        for i in range(num_constraints)
        for k in range(i)
        for share in (0.25, 0.5, 0.75)
    ]
    return [*alone, *mixed, (1 / num_constraints,) * num_constraints]


def _solutions(
    kept: Sequence[int], retained: Retained, options: _LayerChoices, constraints: Sequence[_Constraint]
) -> Iterator[tuple[tuple[LayerCounts, ...], float]]:
    """Solutions for the layers `kept` at several capacities, without repeats, each with what it retains."""
    parts = [options.costs(constraint.cost, kept) for constraint in constraints]
    if any(part.base >= constraint.limit for part, constraint in zip(parts, constraints, strict=True)):
        return
    values = [
        values
        for layer in kept
        for values in (
            retained.attention_values(layer, options.attention),
            retained.ffn_values(layer, options.ffn),
        )
    ]
    seen = set()
    for weights in _mixtures(len(constraints)):
        capacity = 0.0
        attention, ffn = [np.zeros(len(options.attention)) for _ in kept], np.zeros(len(options.ffn))
        for weight, part, constraint in zip(weights, parts, constraints, strict=True):
            capacity += weight * (1 - part.base / constraint.limit)
            attention = [
                so_far + weight * added / constraint.limit
                for so_far, added in zip(attention, part.attention, strict=True)
            ]
            ffn += weight * part.ffn / constraint.limit
        costs = [costs for of_layer in attention for costs in (of_layer, ffn)]
        solved = solve_knapsack(costs, values, capacity=capacity)
        for share in CAPACITIES:
            chosen = solved.solution(capacity - (1 - share))
            if chosen is None or chosen in seen:
                continue
            seen.add(chosen)
            layers = tuple(
                LayerCounts(layer, *options.attention[heads], options.ffn[neurons])
                for layer, heads, neurons in zip(kept, chosen[::2], chosen[1::2], strict=True)
            )
            total = sum(float(value[option]) for value, option in zip(values, chosen, strict=True))
            yield layers, min(1.0, total / len(chosen))


def _shape(dense: DenseArchitecture) -> Shape:
    """Depth, and the kept share of the layers' prunable weights, to four digits."""
    base = dense.base
    kept = sum(base.prunable_params(layer) for layer in dense.layers)
    share = kept / (len(dense.layers) * base.prunable_params())
    return Shape(len(dense.layers), max(0.0001, round(share, 4)))


def _plan(
    strategy: Strategy,
    architecture: Architecture,
    retained: Retained,
    layers: Sequence[LayerCounts],
    gate_widths: Sequence[float],
) -> SubnetPlan:
    shape = _shape(_LayerChoices(architecture, 1, strategy.compensation).dense(layers))
    plan = SubnetPlan(
        shape=shape,
        policy="adaptive",
        layers=tuple(retained.layer_plan(*layer) for layer in layers),
        compensate=strategy.compensation != "none",
        gate_width=nearest_gate_width(gate_widths, shape.width),
        strategy_id=strategy.identity,
        model_id=strategy.model_id,
    )
    validate(plan, architecture)
    return plan
