"""Choose a subnet: sketch what is possible, predict each, keep the best one that meets every limit."""

from __future__ import annotations

import math
from collections.abc import Sequence, Set
from dataclasses import dataclass

from amoeba_export.errors import NothingFits
from amoeba_export.ir import Architecture, Budget, DenseArchitecture, Latency, Policy, Strategy, SubnetPlan
from amoeba_export.ir.derive import Unit
from amoeba_export.search.grid import grid_sketches
from amoeba_export.search.layers import layers_sketches
from amoeba_export.search.pareto import pareto_front
from amoeba_export.search.predict import Corrected, Counts, Predictor, counts_of
from amoeba_export.search.quality import quality_surface
from amoeba_export.search.space import Candidate, Limits, Memory, SearchResult, Sketch, Space


def search_plan(
    strategy: Strategy,
    architecture: Architecture,
    predictor: Predictor,
    budgets: Sequence[Budget],
    *,
    space: Space | None = None,
    policy: Policy = "uniform",
    align: int = 1,
    gate_widths: Sequence[float] = (),
    unit: Unit = "kv_group",
    full: Latency | None = None,
    measured: Sequence[tuple[DenseArchitecture, Latency]] = (),
    refused: Sequence[DenseArchitecture] = (),
    margin: float = 0.0,
    memory_mb: Memory | None = None,
    memory_limit_mb: float | None = None,
) -> SearchResult:
    """The best subnet of `strategy` under `budgets`, and everything that it was compared with.

    A closed loop calls it again with each artifact that it measured, until the choice is one of the measured: the
    search then steps down from an artifact that was over its budget, and up from one that was far under.

    Args:
        strategy: What to keep at each shape, and the quality of some shapes.
        architecture: The supernet.
        predictor: Latency of any cut, such as a cost table.
        budgets: All of them hold for a candidate that fits. The first one is the one that is reported.
        space: `grid` or `layers`; None means `layers` for the adaptive policy and `grid` for the uniform one. `layers`
            contains the grid that the strategy's quality was measured on, so its choice is never worse on the same
            estimate. An upstream import has no importances, hence its grid only.
        policy: How a `grid` spreads a width over layers.
        align: Neuron counts are multiples of this.
        gate_widths: Width choices of a SMoL gate.
        unit: What the grid cuts attention in.
        full: Latency of the uncut model, which relative budgets refer to; its prediction when None.
        measured: Models that were measured in this run, `full` apart; predictions are corrected by them.
        refused: Models that do not count as within the limits, whatever was measured of them.
        margin: The share of a limit that predictions stay away from it. What was measured need not.
        memory_mb: What a model occupies.
        memory_limit_mb: How much it may.

    Raises:
        NothingFits: No candidate meets all limits.
    """
    assert budgets, "a search needs a budget"
    uncut = SubnetPlan.full(architecture).dense(architecture)
    corrected = Corrected(predictor, [*([(uncut, full)] if full else []), *measured])
    limits = Limits(
        budgets=tuple((budget, _limit_ms(budget, corrected, uncut, full)) for budget in budgets),
        margin=margin,
        memory_mb=memory_mb,
        memory_limit_mb=memory_limit_mb,
    )
    space = space or ("layers" if policy == "adaptive" else "grid")
    if space == "layers":
        policy = "adaptive" if strategy.policy == "adaptive" else "uniform"
    sketches = grid_sketches(strategy, architecture, policy=policy, align=align, gate_widths=gate_widths, unit=unit)
    if space == "layers" and strategy.importance is not None:
        sketches += layers_sketches(strategy, architecture, corrected, limits, align=align, gate_widths=gate_widths)
    refused_counts = {counts_of(dense) for dense in refused}
    figures = [_figures(sketch.dense, corrected, limits, refused_counts) for sketch in sketches]
    closest = min(range(len(figures)), key=lambda i: (figures[i].refused, figures[i].load))
    if not figures[closest].fits:
        raise _nothing_fits(sketches[closest], figures[closest], limits)
    surface = quality_surface(strategy)
    sign = -1.0 if surface.higher_is_better else 1.0
    front = set(
        pareto_front(
            [
                (*figure.budget_ms, figure.memory_mb or 0.0, sign * sketch.quality.value)
                for sketch, figure in zip(sketches, figures, strict=True)
            ]
        )
    )
    candidates = [
        _candidate(sketch, figure, on_pareto=i in front)
        for i, (sketch, figure) in enumerate(zip(sketches, figures, strict=True))
    ]
    return SearchResult(
        candidates=tuple(
            sorted(candidates, key=lambda one: (not one.fits, one.fits * sign * one.quality.value, one.predicted_ms))
        ),
        limits=limits.budgets,
        quality_metric=surface.metric,
        higher_is_better=surface.higher_is_better,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Figures:
    """What is predicted of one sketch. `load` is the largest share that it takes of any limit."""

    budget_ms: tuple[float, ...]
    uncertainty: float
    decode_ms: float
    prefill_ms: float
    e2e_ms: float
    memory_mb: float | None
    load: float
    refused: bool

    @property
    def fits(self) -> bool:
        return self.load <= 1 and not self.refused


def _limit_ms(budget: Budget, predictor: Predictor, uncut: DenseArchitecture, full: Latency | None) -> float:
    if budget.fraction is None:
        return budget.resolve()
    if full is not None:
        return budget.resolve(full.of(budget.metric, budget.percentile))
    return budget.resolve(predictor.predict(uncut, budget.metric, budget.percentile)[0])


def _figures(dense: DenseArchitecture, predictor: Predictor, limits: Limits, refused: Set[Counts]) -> _Figures:
    times = [predictor.predict(dense, budget.metric, budget.percentile) for budget, _ in limits.budgets]
    loads = [
        ms / (limit_ms if error == 0 else (1 - limits.margin) * limit_ms)
        for (ms, error), (_, limit_ms) in zip(times, limits.budgets, strict=True)
    ]
    memory_mb = limits.memory_mb(dense) if limits.memory_mb else None
    if memory_mb is not None and limits.memory_limit_mb is not None:
        loads.append(memory_mb / limits.memory_limit_mb)
    return _Figures(
        budget_ms=tuple(ms for ms, _ in times),
        uncertainty=times[0][1],
        decode_ms=predictor.predict(dense, "decode")[0],
        prefill_ms=predictor.predict(dense, "prefill")[0],
        e2e_ms=predictor.predict(dense, "e2e")[0],
        memory_mb=memory_mb,
        load=max(loads),
        refused=counts_of(dense) in refused,
    )


def _candidate(sketch: Sketch, figures: _Figures, *, on_pareto: bool) -> Candidate:
    return Candidate(
        shape=sketch.shape,
        policy=sketch.policy,
        dense=sketch.dense,
        quality=sketch.quality,
        predicted_ms=figures.budget_ms[0],
        uncertainty=figures.uncertainty,
        decode_ms=figures.decode_ms,
        prefill_ms=figures.prefill_ms,
        e2e_ms=figures.e2e_ms,
        memory_mb=figures.memory_mb,
        fits=figures.fits,
        on_pareto=on_pareto,
        make_plan=sketch.make_plan,
    )


def _nothing_fits(closest: Sketch, figures: _Figures, limits: Limits) -> NothingFits:
    wanted, reached = [], []
    for (budget, limit_ms), ms in zip(limits.budgets, figures.budget_ms, strict=True):
        wanted.append(f"{budget.metric} p{budget.percentile} <= {limit_ms:.4g} ms")
        reached.append(f"{ms:.4g} ms")
    if limits.memory_limit_mb is not None and figures.memory_mb is not None:
        wanted.append(f"memory <= {limits.memory_limit_mb:.4g} MB")
        reached.append(f"{figures.memory_mb:.4g} MB")
    if len(wanted) == 1 and figures.uncertainty:
        reached[0] += f", give or take {100 * figures.uncertainty:.0f} %"
    advice = "Relax the limits"
    if len(wanted) == 1:
        raised_ms = limits.budgets[0][1] * figures.load
        advice = f"Allow {math.ceil(raised_ms * 100) / 100:g} ms or more"
    return NothingFits(
        " and ".join(wanted),
        str(closest.shape),
        " and ".join(reached),
        next_step=f"{advice}, or calibrate with more removed layers or smaller widths.",
    )
