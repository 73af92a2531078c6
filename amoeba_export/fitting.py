"""The closed loop: choose a subnet, build it, measure it, and choose again until the budget is kept and used."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from amoeba_export.artifact import Cache
from amoeba_export.backends import Subject, find_backend
from amoeba_export.costing import MOST_ROUNDS, is_measured, learn, make_predictor, measure_beside_full
from amoeba_export.errors import BudgetMissed, NothingFits, TargetError
from amoeba_export.ir import (
    SILENT,
    Budget,
    DenseArchitecture,
    Latency,
    Progress,
    SubnetPlan,
    Supernet,
    Target,
)
from amoeba_export.profile import Comparison, Verdict, compare_rounds, predict_memory_mb
from amoeba_export.request import Settings
from amoeba_export.search import Candidate, Predictor, SearchResult, search_plan
from amoeba_export.selection import gate_widths

MAX_BUILDS = 6
"""Subnets that are built and measured before the best of them is taken, or none."""

GOOD_USE = 0.96
"""A subnet that keeps the budget and uses this share of it is not worth another build."""

MARGIN = 0.02
"""The share of a budget that predictions leave free, at least: on a noisy machine, as much as cannot be told apart."""

Build = Callable[[SubnetPlan], Path]
"""Writes a plan's files in place of the last one's, and returns their folder."""


@dataclass(frozen=True, kw_only=True)
class Fitted:
    """A plan whose files were built, and what is known of its latency.

    Attributes:
        candidate: What the search said of it; None when the shape or plan was given.
        limit_ms: The budget in milliseconds, or None without one.
        predicted_ms: What was expected before it was measured, and its relative `uncertainty`.
        latency: Measured, or estimated where the target is; None without a target.
        full: The same of the uncut model, from the same run.
        search: What it was chosen from; None when the shape or plan was given.
    """

    plan: SubnetPlan
    candidate: Candidate | None = None
    limit_ms: float | None = None
    predicted_ms: float | None = None
    uncertainty: float | None = None
    latency: Latency | None = None
    full: Latency | None = None
    search: SearchResult | None = None


def choose(
    supernet: Supernet,
    settings: Settings,
    predictor: Predictor,
    *,
    full: Latency | None = None,
    measured: tuple[tuple[DenseArchitecture, Latency], ...] = (),
    refused: tuple[DenseArchitecture, ...] = (),
    margin: float = MARGIN,
) -> SearchResult:
    """Search once, with what was measured so far.

    Where the target will be asked about the choice, predictions stay `margin` away from the limits, if anything does.

    Raises:
        NothingFits: Not even without a margin.
    """
    assert settings.budgets and settings.target and supernet.strategy, "a search needs a budget, a target, a strategy"
    dtype = _dtype(settings, settings.target)
    search = partial(
        search_plan,
        supernet.strategy,
        supernet.architecture,
        predictor,
        settings.budgets,
        policy=settings.policy,
        align=settings.align,
        gate_widths=gate_widths(supernet),
        full=full,
        measured=measured,
        refused=refused,
        memory_mb=lambda dense: predict_memory_mb(dense, dtype=dtype, workload=settings.workload),
        memory_limit_mb=settings.memory_limit_mb,
    )
    if is_measured(settings.target):
        with suppress(NothingFits):
            return search(margin=margin)
    return search()


def fit_budget(
    supernet: Supernet, settings: Settings, build: Build, *, cache: Cache, progress: Progress = SILENT
) -> Fitted:
    """Build the best subnet that keeps the budget on the target.

    A target that is measured is asked about every subnet that is built, beside the full model in the same run. One
    that misses, or cannot be shown to keep the budget, corrects the cost model and a smaller one is built; one that is
    far under, a larger one. Where none can be shown to keep it, one that seems to is taken. A target that is an
    estimate is searched once.

    Raises:
        BudgetError: Nothing fits, by prediction or when measured.
        TargetError: The target cannot be used, or measuring failed.
    """
    target, budgets = settings.target, settings.budgets
    assert target and budgets and supernet.strategy
    predictor = make_predictor(
        supernet,
        target,
        settings.workload,
        _dtype(settings, target),
        cache=cache,
        min_depth=supernet.strategy.min_depth,
        progress=progress,
    )
    if not is_measured(target):
        result = choose(supernet, settings, predictor)
        plan = result.best.make_plan()
        build(plan)
        return dataclasses.replace(_given(supernet, settings, plan, predictor, result.best), search=result)
    trials, result = _try_in_turn(supernet, settings, predictor, build, progress=progress)
    learn(
        supernet,
        target,
        settings.workload,
        _dtype(settings, target),
        [(trial.candidate.dense, trial.full, trial.latency) for trial in trials],
        cache=cache,
        min_depth=supernet.strategy.min_depth,
    )
    kept = [trial for trial in trials if trial.is_kept] or [trial for trial in trials if trial.use <= 1]
    if not kept:
        closest = min(trials, key=lambda trial: trial.use)
        raise _missed(closest.plan, budgets, closest.latency, closest.full)
    sign = -1 if result.higher_is_better else 1
    chosen = min(kept, key=lambda trial: (sign * trial.candidate.quality.value, trial.use))
    if chosen is not trials[-1]:
        build(chosen.plan)
    return dataclasses.replace(chosen.fitted(), search=result)


def _try_in_turn(
    supernet: Supernet, settings: Settings, predictor: Predictor, build: Build, *, progress: Progress
) -> tuple[list[_Trial], SearchResult]:
    """Build and measure what the search chooses until it keeps the budget and uses it, or nothing new is chosen.

    Returns:
        What was built, at least one, and what the last search saw.

    Raises:
        NothingFits: By prediction, and nothing that was built seems to keep the budget.
        TargetError: Measuring failed.
    """
    budgets = settings.budgets
    trials: list[_Trial] = []
    full: Latency | None = None
    while True:
        try:
            result = choose(
                supernet,
                settings,
                predictor,
                full=full,
                measured=_beside(trials, full),
                refused=tuple(trial.candidate.dense for trial in trials if not trial.is_kept),
                margin=max([MARGIN, *(trial.doubt for trial in trials)]),
            )
        except NothingFits:
            if any(trial.use <= 1 for trial in trials):
                return trials, result
            raise
        best, limit_ms = result.best, result.limits[0][1]
        if len(trials) == MAX_BUILDS or any(trial.candidate.dense == best.dense for trial in trials):
            return trials, result
        progress.note(f"Building {best.shape}: {best.predicted_ms:.4g} ms expected, the limit is {limit_ms:.4g} ms.")
        plan = best.make_plan()
        full, latency = _measure(
            supernet, settings, best.dense, build(plan), enough=_looks_slow_or_is_decided, progress=progress
        )
        trial = _Trial(
            plan=plan,
            candidate=best,
            full=full,
            latency=latency,
            expected_ms=best.predicted_ms * (_limit_ms(budgets[0], full) / limit_ms),
            budgets=budgets,
        )
        close = " Too close to it to be sure." if trial.use <= 1 and not trial.is_kept else ""
        progress.note(f"Measured {best.shape}: {trial.reached_ms:.4g} ms, the limit is {trial.limit_ms:.4g} ms.{close}")
        trials.append(trial)
        if trial.is_kept and trial.use >= GOOD_USE:
            return trials, result


def fit_plan(
    supernet: Supernet, settings: Settings, plan: SubnetPlan, build: Build, *, progress: Progress = SILENT
) -> Fitted:
    """Build `plan`, and say how fast it is where there is a target.

    Raises:
        BudgetMissed: There is a budget, and it is over it.
        TargetError: The target cannot be used, or measuring failed.
    """
    folder = build(plan)
    if settings.target is None:
        return Fitted(plan=plan)
    if is_measured(settings.target):
        full, latency = _measure(
            supernet, settings, plan.dense(supernet.architecture), folder, enough=_is_decided, progress=progress
        )
        fitted = Fitted(plan=plan, latency=latency, full=full)
    else:
        predictor = make_predictor(
            supernet, settings.target, settings.workload, _dtype(settings, settings.target), cache=Cache()
        )
        fitted = _given(supernet, settings, plan, predictor, None)
    if not settings.budgets:
        return fitted
    assert fitted.latency and fitted.full
    if max(_uses(settings.budgets, fitted.latency, fitted.full)) > 1:
        raise _missed(plan, settings.budgets, fitted.latency, fitted.full)
    return dataclasses.replace(fitted, limit_ms=_limit_ms(settings.budgets[0], fitted.full))


@dataclass(frozen=True, kw_only=True)
class _Trial:
    """A subnet that was built and measured beside the full model.

    Attributes:
        expected_ms: What the search predicted, in terms of the run that measured it: where that run was slower for the
            full model than the search took it to be, this is raised by as much.
    """

    plan: SubnetPlan
    candidate: Candidate
    full: Latency
    latency: Latency
    expected_ms: float
    budgets: tuple[Budget, ...]

    @property
    def limit_ms(self) -> float:
        """Of the first budget."""
        return _limit_ms(self.budgets[0], self.full)

    @property
    def reached_ms(self) -> float:
        """What the first budget is about."""
        return self.latency.of(self.budgets[0].metric, self.budgets[0].percentile)

    @property
    def use(self) -> float:
        """Share that it takes of the budget that it takes most of."""
        return max(_uses(self.budgets, self.latency, self.full))

    @property
    def is_kept(self) -> bool:
        """Whether the rounds show that every budget is kept. A backend that reports no rounds is taken at its word."""
        return self.use <= 1 and _verdicts(self.budgets, self.full, self.latency) <= {"not slower"}

    @property
    def doubt(self) -> float:
        """How far below a budget a model must be measured for as many rounds as are allowed to show that it is kept.

        A share of the budget: an interval narrows with the square root of the number of rounds. 0 without one.
        """
        found = 0.0
        for comparison in _comparisons(self.budgets, self.full, self.latency):
            if math.isfinite(comparison.high):
                width = math.log(comparison.high / comparison.ratio)
                found = max(found, 1 - math.exp(-width * math.sqrt(comparison.rounds / MOST_ROUNDS)))
        return found

    def fitted(self) -> Fitted:
        return Fitted(
            plan=self.plan,
            candidate=self.candidate,
            limit_ms=self.limit_ms,
            predicted_ms=self.expected_ms,
            uncertainty=self.candidate.uncertainty,
            latency=self.latency,
            full=self.full,
        )


def _beside(trials: list[_Trial], full: Latency | None) -> tuple[tuple[DenseArchitecture, Latency], ...]:
    """What was measured, as it would have been in the run that measured `full` (the last one).

    A relative budget is a ratio to the full model of the same run, so earlier runs are scaled by how much slower or
    faster that model was then. An absolute budget takes times as they were.
    """
    assert full or not trials
    return tuple(
        (trial.candidate.dense, trial.latency.as_when(trial.full, full) if _is_relative(trial) else trial.latency)
        for trial in trials
        if full
    )


def _is_relative(trial: _Trial) -> bool:
    return all(budget.fraction for budget in trial.budgets)


def _limit_ms(budget: Budget, full: Latency) -> float:
    return budget.resolve(full.of(budget.metric, budget.percentile))


def _uses(budgets: Sequence[Budget], latency: Latency, full: Latency) -> list[float]:
    """The share of each budget that a model of this `latency` takes, `full` being that of the uncut one."""
    return [latency.of(budget.metric, budget.percentile) / _limit_ms(budget, full) for budget in budgets]


def _comparisons(budgets: Sequence[Budget], full: Latency, latency: Latency) -> list[Comparison]:
    """The model with each budget, round by round; none where the backend reports no rounds."""
    return [
        compare_rounds(_rounds_ms(latency, budget), [budget.resolve(ms) for ms in _rounds_ms(full, budget)])
        for budget in budgets
        if latency.rounds and full.rounds
    ]


def _verdicts(budgets: Sequence[Budget], full: Latency, latency: Latency) -> set[Verdict]:
    return {comparison.verdict(0.0) for comparison in _comparisons(budgets, full, latency)}


def _is_decided(budgets: Sequence[Budget], full: Latency, latency: Latency) -> bool:
    """Whether the rounds show that every budget is kept, or that one is not."""
    verdicts = _verdicts(budgets, full, latency)
    return "slower" in verdicts or "undecided" not in verdicts


def _looks_slow_or_is_decided(budgets: Sequence[Budget], full: Latency, latency: Latency) -> bool:
    """In a search, what looks too slow needs no proof: a smaller one is next."""
    return max(_uses(budgets, latency, full)) > 1 or _is_decided(budgets, full, latency)


def _rounds_ms(latency: Latency, budget: Budget) -> list[float]:
    """What the budget is about, in each round."""
    tail = latency.of(budget.metric, budget.percentile) / latency.of(budget.metric)
    return [ms * tail for ms in latency.rounds_of(budget.metric)]


def _missed(plan: SubnetPlan, budgets: Sequence[Budget], latency: Latency, full: Latency) -> BudgetMissed:
    """The error that names the budget that is missed by most."""
    uses = _uses(budgets, latency, full)
    worst = budgets[uses.index(max(uses))]
    reached_ms = latency.of(worst.metric, worst.percentile)
    return BudgetMissed(str(plan.shape), worst.metric, worst.percentile, reached_ms, _limit_ms(worst, full))


def _given(
    supernet: Supernet, settings: Settings, plan: SubnetPlan, predictor: Predictor, candidate: Candidate | None
) -> Fitted:
    """What an estimated target says of `plan`."""
    target, budget = settings.target, settings.budget
    assert target
    dtype = _dtype(settings, target)
    dense = [plan.dense(supernet.architecture), SubnetPlan.full(supernet.architecture).dense(supernet.architecture)]
    results = find_backend(target.backend).measure(
        [Subject(dense=one, dtype=dtype) for one in dense], settings.workload, target=target
    )
    for result in results:
        if isinstance(result, TargetError):
            raise result
    latency, full = results
    assert isinstance(latency, Latency) and isinstance(full, Latency)
    metric, percentile = (budget.metric, budget.percentile) if budget else (target.metric, 50)
    predicted_ms, uncertainty = predictor.predict(dense[0], metric, percentile)
    return Fitted(
        plan=plan,
        candidate=candidate,
        limit_ms=_limit_ms(budget, full) if budget else None,
        predicted_ms=predicted_ms,
        uncertainty=uncertainty,
        latency=latency,
        full=full,
    )


def _measure(
    supernet: Supernet,
    settings: Settings,
    dense: DenseArchitecture,
    folder: Path,
    *,
    enough: Callable[[Sequence[Budget], Latency, Latency], bool],
    progress: Progress,
) -> tuple[Latency, Latency]:
    """Measure the files in `folder`; where the target cannot run their formats, a graph of the same dims."""
    assert settings.target
    containers = find_backend(settings.target.backend).containers
    artifact = folder if any(container in settings.formats for container in containers) else None
    subject = Subject(
        dense=dense,
        artifact=artifact,
        dtype=_dtype(settings, settings.target),
        label=f"the subnet of {len(dense.layers)} layers",
    )
    return measure_beside_full(
        supernet.architecture,
        subject,
        settings.target,
        settings.workload,
        enough=partial(enough, settings.budgets),
        progress=progress,
    )


def _dtype(settings: Settings, target: Target) -> str:
    return settings.dtype or target.dtype
