"""The closed loop: choose a subnet, build it, measure it, and choose again until the budget is kept and used."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median

from amoeba_export.application.costs import is_measured, learn, make_predictor, measure_beside_full
from amoeba_export.application.outcome import Outcome
from amoeba_export.application.request import Settings
from amoeba_export.application.selection import gate_widths
from amoeba_export.artifact import Cache
from amoeba_export.backends import Subject, find_backend
from amoeba_export.errors import BudgetMissed, NothingFits, TargetError
from amoeba_export.ir import (
    SILENT,
    DenseArchitecture,
    Latency,
    Progress,
    SubnetPlan,
    Supernet,
    Target,
)
from amoeba_export.profile import predict_memory_mb
from amoeba_export.search import Candidate, Predictor, SearchResult, search_plan

MAX_BUILDS = 6
"""Subnets that are built and measured before the best of them is taken, or none."""

GOOD_USE = 0.97
"""A subnet that keeps the budget and uses this share of it is not worth another build."""

MARGIN = 0.02
"""The share of a budget that predictions leave free; on a noisy machine, as much as cannot be told apart. Where nothing
is that far below the budget, less."""

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

    Where the target will be asked about the choice, predictions stay `margin` away from the limits, or else `MARGIN`,
    or else what they can.

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
    margins = sorted({margin, MARGIN}, reverse=True) if is_measured(settings.target) else []
    for one in margins:
        with suppress(NothingFits):
            return search(margin=one)
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
        [(trial.candidate.dense, trial.outcome.full, trial.outcome.latency) for trial in trials],
        cache=cache,
        min_depth=supernet.strategy.min_depth,
    )
    sign = -1 if result.higher_is_better else 1
    kept = [trial for trial in trials if trial.outcome.is_kept]
    if kept:
        chosen = min(kept, key=lambda trial: (sign * trial.candidate.quality.value, trial.outcome.use))
    else:
        chosen = min(trials, key=lambda trial: trial.outcome.use)
        if chosen.outcome.use > 1:
            raise _missed(chosen.plan, chosen.outcome, was_given=False)
        progress.warn(
            f"{len(chosen.outcome.latency.rounds)} rounds do not show that any subnet keeps the budget."
            f" {chosen.candidate.shape} is taken, which does by its median."
        )
    if chosen is not trials[-1]:
        build(chosen.plan)
    return dataclasses.replace(chosen.fitted(), search=result)


def _try_in_turn(
    supernet: Supernet, settings: Settings, predictor: Predictor, build: Build, *, progress: Progress
) -> tuple[list[_Trial], SearchResult]:
    """Build and measure what the search chooses until it keeps the budget and uses it, or nothing new is chosen.

    Returns:
        What was built, at least one, and what the last search saw that chose something.

    Raises:
        NothingFits: By prediction, before anything was built.
        TargetError: Measuring failed.
    """
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
                refused=tuple(trial.candidate.dense for trial in trials if not trial.outcome.is_kept),
                margin=max(MARGIN, median(trial.outcome.doubt for trial in trials) if trials else 0.0),
            )
        except NothingFits:
            if not trials:
                raise
            return trials, result
        best, limit_ms = result.best, result.limits[0][1]
        if len(trials) == MAX_BUILDS or any(trial.candidate.dense == best.dense for trial in trials):
            return trials, result
        progress.note(f"Building {best.shape}: {best.predicted_ms:.4g} ms expected, the limit is {limit_ms:.4g} ms.")
        plan = best.make_plan()
        outcome = _measure(supernet, settings, best.dense, build(plan), enough=_is_enough, progress=progress)
        full = outcome.full
        close = " Too close to it to be sure." if outcome.use <= 1 and not outcome.is_kept else ""
        progress.note(
            f"Measured {best.shape}: {outcome.reached_ms:.4g} ms, the limit is {outcome.limit_ms:.4g} ms.{close}"
        )
        expected_ms = best.predicted_ms * (outcome.limit_ms / limit_ms)
        trials.append(_Trial(plan=plan, candidate=best, outcome=outcome, expected_ms=expected_ms))
        if outcome.is_kept and outcome.use >= GOOD_USE:
            return trials, result


def _is_enough(outcome: Outcome) -> bool:
    """In a search, what looks too slow needs no proof: a smaller one is next."""
    return outcome.use > 1 or outcome.is_decided


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
        measured = _measure(
            supernet,
            settings,
            plan.dense(supernet.architecture),
            folder,
            enough=lambda outcome: outcome.is_decided,
            progress=progress,
        )
        fitted = Fitted(plan=plan, latency=measured.latency, full=measured.full)
    else:
        predictor = make_predictor(
            supernet, settings.target, settings.workload, _dtype(settings, settings.target), cache=Cache()
        )
        fitted = _given(supernet, settings, plan, predictor, None)
    if not settings.budgets:
        return fitted
    assert fitted.latency and fitted.full
    outcome = Outcome(budgets=settings.budgets, full=fitted.full, latency=fitted.latency)
    if outcome.use > 1:
        raise _missed(plan, outcome, was_given=True)
    return dataclasses.replace(fitted, limit_ms=outcome.limit_ms)


@dataclass(frozen=True, kw_only=True)
class _Trial:
    """A subnet that was built and measured.

    Attributes:
        candidate: What the search said of it.
        expected_ms: What the search predicted, in terms of the run that measured it: where that run was slower for the
            full model than the search took it to be, this is raised by as much.
    """

    plan: SubnetPlan
    candidate: Candidate
    outcome: Outcome
    expected_ms: float

    def fitted(self) -> Fitted:
        return Fitted(
            plan=self.plan,
            candidate=self.candidate,
            limit_ms=self.outcome.limit_ms,
            predicted_ms=self.expected_ms,
            uncertainty=self.candidate.uncertainty,
            latency=self.outcome.latency,
            full=self.outcome.full,
        )


def _beside(trials: list[_Trial], full: Latency | None) -> tuple[tuple[DenseArchitecture, Latency], ...]:
    """What was measured, as it would have been in the run that measured `full` (the last one).

    A relative budget is a ratio to the full model of the same run, so earlier runs are scaled by how much slower or
    faster that model was then. An absolute budget takes times as they were.
    """
    measured = []
    for trial in trials:
        assert full
        latency = trial.outcome.latency
        if all(budget.fraction for budget in trial.outcome.budgets):
            latency = latency.as_when(trial.outcome.full, full)
        measured.append((trial.candidate.dense, latency))
    return tuple(measured)


def _missed(plan: SubnetPlan, outcome: Outcome, *, was_given: bool) -> BudgetMissed:
    """The error that names the budget that is missed by most."""
    budget, limit_ms, reached_ms = outcome.tightest
    return BudgetMissed(str(plan.shape), budget.metric, budget.percentile, reached_ms, limit_ms, was_given=was_given)


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
        limit_ms=budget.resolve(full.of(budget.metric, budget.percentile)) if budget else None,
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
    enough: Callable[[Outcome], bool],
    progress: Progress,
) -> Outcome:
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
    budgets = settings.budgets
    full, latency = measure_beside_full(
        supernet.architecture,
        subject,
        settings.target,
        settings.workload,
        enough=lambda full, latency: not budgets or enough(Outcome(budgets=budgets, full=full, latency=latency)),
        progress=progress,
    )
    return Outcome(budgets=budgets, full=full, latency=latency)


def _dtype(settings: Settings, target: Target) -> str:
    return settings.dtype or target.dtype
