"""The closed loop: choose a subnet, build it, measure it, and choose again until the budget is kept and used."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from amoeba_export.application.choose import choose
from amoeba_export.application.costs import is_measured, learn, make_predictor, measure_beside_full
from amoeba_export.application.outcome import Outcome
from amoeba_export.application.session import Session
from amoeba_export.application.trials import Trial, best_of, next_step
from amoeba_export.backends import Subject, find_backend
from amoeba_export.errors import BudgetMissed, TargetError
from amoeba_export.ir import DenseArchitecture, Latency, SubnetPlan
from amoeba_export.search import Candidate, Predictor, SearchResult

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


def fit_budget(session: Session, build: Build) -> Fitted:
    """Build the best subnet that keeps the budget on the target.

    A target that is measured is asked about every subnet that is built, beside the full model in the same run. One
    that misses, or cannot be shown to keep the budget, corrects the cost model and a smaller one is built; one that is
    far under, a larger one. Where none can be shown to keep it, one that seems to is taken. A target that is an
    estimate is searched once.

    Raises:
        BudgetError: Nothing fits, by prediction or when measured.
        TargetError: The target cannot be used, or measuring failed.
    """
    predictor = make_predictor(session)
    if not is_measured(session.target):
        result = choose(session, predictor)
        plan = result.best.make_plan()
        build(plan)
        return dataclasses.replace(_given(session, plan, predictor, result.best), search=result)
    trials, result = _try_in_turn(session, predictor, build)
    learn(session, [(trial.candidate.dense, trial.outcome.full, trial.outcome.latency) for trial in trials])
    chosen = best_of(trials)
    if chosen.outcome.use > 1:
        raise _missed(chosen.plan, chosen.outcome, was_given=False)
    if not chosen.outcome.is_kept:
        session.progress.warn(
            f"{len(chosen.outcome.latency.rounds)} rounds do not show that any subnet keeps the budget."
            f" {chosen.candidate.shape} is taken, which does by its median."
        )
    if chosen is not trials[-1]:
        build(chosen.plan)
    return _fitted(chosen, result)


def _try_in_turn(session: Session, predictor: Predictor, build: Build) -> tuple[list[Trial], SearchResult]:
    """What was built, at least one, and what the last search saw that chose something.

    Raises:
        NothingFits: By prediction, before anything was built.
        TargetError: Measuring failed.
    """
    trials: list[Trial] = []
    while (step := next_step(trials, partial(choose, session, predictor))).build:
        best, limit_ms = step.search.best, step.search.limits[0][1]
        session.progress.note(
            f"Building {best.shape}: {best.predicted_ms:.4g} ms expected, the limit is {limit_ms:.4g} ms."
        )
        plan = best.make_plan()
        outcome = _measure(session, best.dense, build(plan), enough=_is_enough)
        close = " Too close to it to be sure." if outcome.use <= 1 and not outcome.is_kept else ""
        session.progress.note(
            f"Measured {best.shape}: {outcome.reached_ms:.4g} ms, the limit is {outcome.limit_ms:.4g} ms.{close}"
        )
        expected_ms = best.predicted_ms * (outcome.limit_ms / limit_ms)
        trials.append(Trial(plan=plan, candidate=best, search=step.search, outcome=outcome, expected_ms=expected_ms))
    return trials, step.search


def _is_enough(outcome: Outcome) -> bool:
    """In a search, what looks too slow needs no proof: a smaller one is next."""
    return outcome.use > 1 or outcome.is_decided


def fit_plan(session: Session, plan: SubnetPlan, build: Build) -> Fitted:
    """Build `plan`, and say how fast it is where there is a target.

    Raises:
        BudgetMissed: There is a budget, and it is over it.
        TargetError: The target cannot be used, or measuring failed.
    """
    folder = build(plan)
    settings = session.settings
    if settings.target is None:
        return Fitted(plan=plan)
    if is_measured(settings.target):
        dense = plan.dense(session.architecture)
        measured = _measure(session, dense, folder, enough=lambda outcome: outcome.is_decided)
        fitted = Fitted(plan=plan, latency=measured.latency, full=measured.full)
    else:
        fitted = _given(session, plan, make_predictor(session), None)
    if not settings.budgets:
        return fitted
    assert fitted.latency and fitted.full
    outcome = Outcome(budgets=settings.budgets, full=fitted.full, latency=fitted.latency)
    if outcome.use > 1:
        raise _missed(plan, outcome, was_given=True)
    return dataclasses.replace(fitted, limit_ms=outcome.limit_ms)


def _fitted(trial: Trial, search: SearchResult) -> Fitted:
    return Fitted(
        plan=trial.plan,
        candidate=trial.candidate,
        limit_ms=trial.outcome.limit_ms,
        predicted_ms=trial.expected_ms,
        uncertainty=trial.candidate.uncertainty,
        latency=trial.outcome.latency,
        full=trial.outcome.full,
        search=search,
    )


def _missed(plan: SubnetPlan, outcome: Outcome, *, was_given: bool) -> BudgetMissed:
    """The error that names the budget that is missed by most."""
    budget, limit_ms, reached_ms = outcome.tightest
    return BudgetMissed(str(plan.shape), budget.metric, budget.percentile, reached_ms, limit_ms, was_given=was_given)


def _given(session: Session, plan: SubnetPlan, predictor: Predictor, candidate: Candidate | None) -> Fitted:
    """What an estimated target says of `plan`."""
    target, budget = session.target, session.settings.budget
    dense = [plan.dense(session.architecture), session.full]
    results = find_backend(target.backend).measure(
        [Subject(dense=one, dtype=session.dtype) for one in dense], session.settings.workload, target=target
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


def _measure(session: Session, dense: DenseArchitecture, folder: Path, *, enough: Callable[[Outcome], bool]) -> Outcome:
    """Measure the files in `folder`; where the target cannot run their formats, a graph of the same dims."""
    containers = find_backend(session.target.backend).containers
    artifact = folder if any(container in session.settings.formats for container in containers) else None
    label = f"the subnet of {len(dense.layers)} layers"
    subject = Subject(dense=dense, artifact=artifact, dtype=session.dtype, label=label)
    budgets = session.settings.budgets
    full, latency = measure_beside_full(
        session,
        subject,
        enough=lambda full, latency: not budgets or enough(Outcome(budgets=budgets, full=full, latency=latency)),
    )
    return Outcome(budgets=budgets, full=full, latency=latency)
