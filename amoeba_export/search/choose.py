"""Choose a subnet: sketch what is possible, predict each, keep the best one that meets every limit."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence, Set
from dataclasses import dataclass
from functools import partial

from amoeba_export.errors import NothingFits, NothingLoads
from amoeba_export.ir import Budget, DenseArchitecture, Latency, LayerDims, SubnetPlan
from amoeba_export.ir.metric import badness
from amoeba_export.ir.pareto import pareto_front
from amoeba_export.search.grid import grid_sketches
from amoeba_export.search.layers import layers_sketches
from amoeba_export.search.predict import Corrected, Counts, Predictor, counts_of
from amoeba_export.search.space import NOTHING_SEEN, Candidate, Limits, Problem, SearchResult, Seen, Sketch
from amoeba_export.search.surface import QualitySurface, quality_surface


def search_plan(problem: Problem, predictor: Predictor, seen: Seen = NOTHING_SEEN) -> SearchResult:
    """The best subnet under the budgets, and everything that it was compared with.

    A closed loop calls it again with each artifact that it measured, until the choice is one of the measured: the
    search then steps down from an artifact that was over its budget, and up from one that was far under.

    Args:
        problem: What is to be chosen, and under which limits.
        predictor: Latency of any cut, such as a cost table.
        seen: What was measured in this run.

    Raises:
        NothingFits: No candidate meets all limits.
    """
    assert problem.budgets, "a search needs a budget"
    uncut = problem.architecture.uncut
    corrected = Corrected(predictor, seen.measured)
    limits = Limits(
        budgets=tuple((budget, _limit_ms(budget, corrected, uncut, seen.full)) for budget in problem.budgets),
        margin=seen.margin,
        memory_mb=problem.memory_mb,
        memory_limit_mb=problem.memory_limit_mb,
    )
    sketches = _sketches(problem, corrected, limits)
    refused_counts = {counts_of(dense) for dense in seen.refused}
    figures = [_figures(sketch.dense, corrected, limits, refused_counts) for sketch in sketches]
    closest = min(range(len(figures)), key=lambda i: (figures[i].refused, figures[i].load))
    if not figures[closest].fits:
        name = f"{sketches[closest].shape} in {problem.dtype}" if problem.dtype else str(sketches[closest].shape)
        raise _nothing_fits(name, figures[closest], limits, problem.smaller)
    return _ranked(quality_surface(problem.strategy), sketches, figures, limits)


def _sketches(problem: Problem, corrected: Corrected, limits: Limits) -> list[Sketch]:
    """What is possible in the problem's space."""
    strategy, architecture, rules = problem.strategy, problem.architecture, problem.rules
    space = problem.space or ("layers" if rules.policy == "adaptive" else "grid")
    if space == "layers":
        rules = dataclasses.replace(rules, policy="adaptive" if strategy.policy == "adaptive" else "uniform")
    sketches = grid_sketches(strategy, architecture, rules)
    if space == "layers" and strategy.importance is not None:
        sketches += layers_sketches(strategy, architecture, rules, corrected, limits)
    if problem.head_tokens is not None:
        sketches = [dataclasses.replace(one, make_plan=partial(_with_head, one.make_plan, problem)) for one in sketches]
    return _loadable(problem, sketches)


def _with_head(make_plan: Callable[[], SubnetPlan], problem: Problem) -> SubnetPlan:
    return dataclasses.replace(make_plan(), head_tokens=problem.head_tokens)


def _loadable(problem: Problem, sketches: list[Sketch]) -> list[Sketch]:
    """Those that the target's runtime loads. Raises `NothingLoads` where it loads none."""
    faults: dict[tuple[LayerDims, ...], list[str]] = {}
    for sketch in sketches:
        key = tuple(dict.fromkeys(sketch.dense.layers))
        if key not in faults:
            faults[key] = problem.runtime.problems(sketch.dense, problem.runtime_dtype)
    kept = [sketch for sketch in sketches if not faults[tuple(dict.fromkeys(sketch.dense.layers))]]
    if sketches and not kept:
        raise NothingLoads(problem.runtime.runtime, next(iter(faults.values())))
    return kept


def _ranked(
    surface: QualitySurface, sketches: Sequence[Sketch], figures: Sequence[_Figures], limits: Limits
) -> SearchResult:
    """All candidates, the choice first."""
    mode = surface.mode
    front = set(
        pareto_front(
            [
                (*figure.budget_ms, figure.memory_mb or 0.0, badness(sketch.quality.value, mode))
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
            sorted(
                candidates,
                key=lambda one: (not one.fits, one.fits * badness(one.quality.value, mode), one.predicted_ms),
            )
        ),
        limits=limits.budgets,
        quality_metric=surface.metric,
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
        return budget.limit_beside(full)
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


def _nothing_fits(closest: str, figures: _Figures, limits: Limits, smaller: str) -> NothingFits:
    wanted, reached = [], []
    for (budget, limit_ms), ms in zip(limits.budgets, figures.budget_ms, strict=True):
        wanted.append(f"{budget.metric} p{budget.percentile} <= {limit_ms:.4g} ms")
        reached.append(f"{ms:.4g} ms")
    if limits.memory_limit_mb is not None and figures.memory_mb is not None:
        wanted.append(f"memory <= {limits.memory_limit_mb:.4g} MiB")
        reached.append(f"{figures.memory_mb:.4g} MiB")
    if len(wanted) == 1 and figures.uncertainty:
        reached[0] += f", give or take {100 * figures.uncertainty:.0f} %"
    advice = "Relax the limits"
    if len(wanted) == 1:
        raised_ms = limits.budgets[0][1] * figures.load
        advice = f"Allow {math.ceil(raised_ms * 100) / 100:g} ms or more"
    return NothingFits(
        " and ".join(wanted),
        closest,
        " and ".join(reached),
        next_step=f"{advice}, or {smaller}.",
        load=figures.load,
    )
