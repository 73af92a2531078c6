"""The closed loop: choose a subnet, build it, measure it, and choose again until the budget is kept and used."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from amoeba_export.application.choose import Chooser
from amoeba_export.application.costs import learn, make_predictor, measure_beside_full
from amoeba_export.application.outcome import Outcome, sure
from amoeba_export.application.problem import memory_mb, smaller_than_known
from amoeba_export.application.session import Session
from amoeba_export.application.trials import Choice, Trial, best_of, next_step
from amoeba_export.application.wholes import Whole
from amoeba_export.backends import Subject
from amoeba_export.errors import BudgetMissed, MemoryExceeded, TargetError
from amoeba_export.ir import DenseArchitecture, Latency, Progress, SubnetPlan
from amoeba_export.profile import pool_rounds
from amoeba_export.search import Candidate, Predictor, SearchResult

_CHOOSE_SMALLER = "let --latency without --shape choose a smaller subnet"

Build = Callable[[Session, SubnetPlan], Path]
"""Writes a plan's files in the session's dtype in place of the last one's, and returns their folder."""


@dataclass(frozen=True, kw_only=True)
class Fitted:
    """A plan whose files were built, and what is known of its latency.

    Attributes:
        session: With the precision and the strategy that it was built with.
        candidate: What the search said of it; None when the shape or plan was given.
        limit_ms: The budget in milliseconds, or None without one.
        predicted_ms: What was expected before it was measured, and its relative `uncertainty`.
        latency: Measured, or estimated where the target is; None without a target.
        full: The same of the uncut model, from the same run.
        search: What it was chosen from; None when the shape or plan was given.
        wholes: The uncut model in each precision; the first one is what a share of it means. Empty without a search.
        searches: The last search of each precision that was searched.
    """

    session: Session
    plan: SubnetPlan
    candidate: Candidate | None = None
    limit_ms: float | None = None
    predicted_ms: float | None = None
    uncertainty: float | None = None
    latency: Latency | None = None
    full: Latency | None = None
    search: SearchResult | None = None
    wholes: tuple[Whole, ...] = ()
    searches: Mapping[str, SearchResult] = field(default_factory=dict)


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
    choose = Chooser(session)
    if not session.is_measured:
        choice = choose()
        plan = choice.candidate.make_plan()
        build(choice.session, plan)
        fitted = _given(choice.session, plan, make_predictor(choice.session), full_dtype=choose.wholes[0].dtype)
        return dataclasses.replace(
            fitted,
            candidate=choice.candidate,
            search=choice.search,
            wholes=choose.wholes,
            searches=choose.searches,
        )
    trials, last = _try_in_turn(choose, build, session.progress)
    for dtype in {trial.choice.found.dtype for trial in trials}:
        _learn(choose, dtype, trials)
    chosen = best_of(trials)
    if chosen.outcome.use > 1:
        raise _missed(chosen.plan, chosen.outcome, smaller=smaller_than_known(chosen.choice.session))
    if not chosen.outcome.is_kept:
        session.progress.warn(
            f"{len(chosen.outcome.latency.rounds)} rounds do not show that any subnet keeps the budget."
            f" {chosen.choice.candidate.shape} is taken, which does by its median."
        )
    if chosen is not trials[-1]:
        build(chosen.choice.session, chosen.plan)
    search = last.search if last.found.dtype == chosen.choice.found.dtype else chosen.choice.search
    return _fitted(chosen, search, choose)


def _try_in_turn(choose: Chooser, build: Build, progress: Progress) -> tuple[list[Trial], Choice]:
    """What was built, at least one, and the last choice that there was.

    Raises:
        NothingFits: By prediction, before anything was built.
        TargetError: Measuring failed.
    """
    trials: list[Trial] = []
    while (step := next_step(trials, choose)).build:
        choice = step.choice
        best, limit_ms, session = choice.candidate, choice.search.limits[0][1], choice.session
        name = choose.name_of(choice)
        progress.note(f"Building {name}: {best.predicted_ms:.4g} ms expected, the limit is {limit_ms:.4g} ms.")
        plan = best.make_plan()
        folder = build(session, plan)
        outcome = sure(
            partial(_measure, session, best.dense, folder, full_dtype=choose.wholes[0].dtype, enough=_is_enough),
            expected_use=best.predicted_ms / limit_ms,
            progress=progress,
        )
        close = " Too close to it to be sure." if outcome.use <= 1 and not outcome.is_kept else ""
        progress.note(f"Measured {name}: {outcome.reached_ms:.4g} ms, the limit is {outcome.limit_ms:.4g} ms.{close}")
        expected_ms = best.predicted_ms * (outcome.limit_ms / limit_ms)
        trials.append(Trial(choice=choice, plan=plan, outcome=outcome, expected_ms=expected_ms))
    return trials, step.choice


def _learn(choose: Chooser, dtype: str, trials: Sequence[Trial]) -> None:
    """Refine the cost table of `dtype`, if there is one, by what was measured beside the full model."""
    latencies = {one.dtype: one.latency for one in choose.wholes}
    reference = choose.wholes[0].latency
    measured = []
    for trial in trials:
        if trial.choice.found.dtype == dtype:
            full = trial.outcome.full  # in the precision of the table: as much slower as the reference was
            own = full if latencies[dtype] is reference else latencies[dtype].as_when(reference, full)
            measured.append((trial.choice.candidate.dense, own, trial.outcome.latency))
    learn(next(trial.choice.session for trial in trials if trial.choice.found.dtype == dtype), measured)


def _is_enough(outcome: Outcome) -> bool:
    """In a search, what looks too slow needs no proof, but an interval: a smaller one is next."""
    return outcome.is_decided or (outcome.use > 1 and outcome.has_interval)


def fit_plan(session: Session, plan: SubnetPlan, build: Build, *, full_dtype: str | None = None) -> Fitted:
    """Build `plan`, and say how fast it is where there is a target.

    Args:
        session: In the precision to build.
        plan: What to build.
        build: Builds it.
        full_dtype: Precision of the full model that it is measured beside; None means its own.

    Raises:
        MemoryExceeded: There is a limit, and it is predicted to be over it.
        BudgetMissed: There is a budget, and it is over it.
        TargetError: The target cannot be used, or measuring failed.
    """
    settings, dense = session.settings, plan.dense(session.architecture)
    limit_mb = settings.memory_limit_mb
    if limit_mb is not None and (occupied_mb := memory_mb(session, dense)) > limit_mb:
        raise MemoryExceeded(str(plan.shape), occupied_mb, limit_mb, smaller=_CHOOSE_SMALLER)
    folder = build(session, plan)
    if settings.target is None:
        return Fitted(session=session, plan=plan)
    if session.is_measured:
        measured = _measure(session, dense, folder, full_dtype=full_dtype, enough=lambda outcome: outcome.is_decided)
        fitted = Fitted(session=session, plan=plan, latency=measured.latency, full=measured.full)
    else:
        fitted = _given(session, plan, make_predictor(session), full_dtype=full_dtype)
    if not settings.budgets:
        return fitted
    assert fitted.latency and fitted.full
    outcome = Outcome(budgets=settings.budgets, full=fitted.full, latency=fitted.latency)
    if outcome.use > 1:
        raise _missed(plan, outcome, smaller=_CHOOSE_SMALLER)
    return dataclasses.replace(fitted, limit_ms=outcome.limit_ms)


def measured_again(fitted: Fitted, folder: Path) -> Fitted:
    """`fitted` with what the files in `folder` were measured at, its rounds pooled with those there were.

    The same graph with other weights: where it is asked again, the budget was shown to be kept before, and a median
    over it now is said and not an error.
    """
    session, settings = fitted.session, fitted.session.settings
    if not session.is_measured or not fitted.latency or not fitted.full:
        return fitted
    full_dtype = fitted.wholes[0].dtype if fitted.wholes else None
    dense = fitted.plan.dense(session.architecture)
    again = _measure(session, dense, folder, full_dtype=full_dtype, enough=lambda outcome: True)
    full, latency = pool_rounds([[fitted.full, fitted.latency], [again.full, again.latency]])
    fitted = dataclasses.replace(fitted, latency=latency, full=full)
    if not settings.budgets:
        return fitted
    outcome = Outcome(budgets=settings.budgets, full=full, latency=latency)
    if outcome.use > 1:
        session.progress.warn(
            f"Measured again, with its final weights: {outcome.reached_ms:.4g} ms;"
            f" the limit is {outcome.limit_ms:.4g} ms."
        )
    return dataclasses.replace(fitted, limit_ms=outcome.limit_ms)


def _fitted(trial: Trial, search: SearchResult, choose: Chooser) -> Fitted:
    return Fitted(
        session=trial.choice.session,
        plan=trial.plan,
        candidate=trial.choice.candidate,
        limit_ms=trial.outcome.limit_ms,
        predicted_ms=trial.expected_ms,
        uncertainty=trial.choice.candidate.uncertainty,
        latency=trial.outcome.latency,
        full=trial.outcome.full,
        search=search,
        wholes=choose.wholes,
        searches=choose.searches,
    )


def _missed(plan: SubnetPlan, outcome: Outcome, *, smaller: str) -> BudgetMissed:
    """The error that names the budget that is missed by most."""
    budget, limit_ms, reached_ms = outcome.tightest
    return BudgetMissed(str(plan.shape), budget.metric, budget.percentile, reached_ms, limit_ms, smaller=smaller)


def _given(session: Session, plan: SubnetPlan, predictor: Predictor, *, full_dtype: str | None = None) -> Fitted:
    """What an estimated target says of `plan`."""
    target, budget = session.target, session.settings.budget
    dense = plan.dense(session.architecture)
    subjects = [
        Subject(dense=dense, dtype=session.dtype),
        Subject(dense=session.full, dtype=full_dtype or session.dtype),
    ]
    results = session.backend.measure(subjects, session.settings.workload, target=target)
    for result in results:
        if isinstance(result, TargetError):
            raise result
    latency, full = results
    assert isinstance(latency, Latency) and isinstance(full, Latency)
    metric, percentile = (budget.metric, budget.percentile) if budget else (target.metric, 50)
    predicted_ms, uncertainty = predictor.predict(dense, metric, percentile)
    return Fitted(
        session=session,
        plan=plan,
        limit_ms=budget.limit_beside(full) if budget else None,
        predicted_ms=predicted_ms,
        uncertainty=uncertainty,
        latency=latency,
        full=full,
    )


def _measure(
    session: Session,
    dense: DenseArchitecture,
    folder: Path,
    *,
    full_dtype: str | None = None,
    enough: Callable[[Outcome], bool],
) -> Outcome:
    """Measure the files in `folder`; where the target cannot run their formats, a graph of the same dims."""
    containers = session.backend.containers
    artifact = folder if any(container in session.settings.formats for container in containers) else None
    label = f"the subnet of {len(dense.layers)} layers"
    subject = Subject(dense=dense, artifact=artifact, dtype=session.dtype, label=label)
    budgets = session.settings.budgets
    full, latency = measure_beside_full(
        session,
        subject,
        full_dtype=full_dtype,
        enough=lambda full, latency: not budgets or enough(Outcome(budgets=budgets, full=full, latency=latency)),
    )
    return Outcome(budgets=budgets, full=full, latency=latency)
