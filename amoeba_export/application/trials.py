"""What the closed loop does next, from what it built and measured: decisions alone, no device is asked here."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median

from amoeba_export.application.choose import MARGIN
from amoeba_export.application.outcome import Outcome
from amoeba_export.errors import NothingFits
from amoeba_export.ir import DenseArchitecture, Latency, SubnetPlan
from amoeba_export.search import Candidate, SearchResult, Seen

MAX_BUILDS = 6
"""Subnets that are built and measured before the best of them is taken, or none."""

GOOD_USE = 0.97
"""A subnet that keeps the budget and uses this share of it is not worth another build."""


@dataclass(frozen=True, kw_only=True)
class Trial:
    """A subnet that was built and measured.

    Attributes:
        candidate: What the search said of it.
        search: What it was chosen from.
        expected_ms: What the search predicted, in terms of the run that measured it: where that run was slower for the
            full model than the search took it to be, this is raised by as much.
    """

    plan: SubnetPlan
    candidate: Candidate
    search: SearchResult
    outcome: Outcome
    expected_ms: float


@dataclass(frozen=True, kw_only=True)
class Step:
    """What comes next: build the choice of `search`, or stop."""

    search: SearchResult
    build: bool


def next_step(history: Sequence[Trial], search: Callable[[Seen], SearchResult]) -> Step:
    """Build what the search chooses in the light of `history`, until a budget is kept and used, or nothing is new.

    Args:
        history: Every trial, in order.
        search: The search, given what was measured. Raises `NothingFits`.

    Raises:
        NothingFits: By prediction, before anything was built.
    """
    last = history[-1] if history else None
    if last and last.outcome.is_kept and last.outcome.use >= GOOD_USE:
        return Step(search=last.search, build=False)
    try:
        found = search(seen_in(history))
    except NothingFits:
        if last is None:
            raise
        return Step(search=last.search, build=False)
    is_new = all(trial.candidate.dense != found.best.dense for trial in history)
    return Step(search=found, build=is_new and len(history) < MAX_BUILDS)


def best_of(history: Sequence[Trial]) -> Trial:
    """The best trial that is shown to keep the budget; where none is, the one that takes least of it."""
    sign = -1 if history[-1].search.higher_is_better else 1
    kept = [trial for trial in history if trial.outcome.is_kept]
    if kept:
        return min(kept, key=lambda trial: (sign * trial.candidate.quality.value, trial.outcome.use))
    return min(history, key=lambda trial: trial.outcome.use)


def seen_in(history: Sequence[Trial]) -> Seen:
    """What the next search learns from `history`."""
    if not history:
        return Seen(margin=MARGIN)
    full = history[-1].outcome.full
    return Seen(
        full=full,
        measured=tuple(_beside(trial, full) for trial in history),
        refused=tuple(trial.candidate.dense for trial in history if not trial.outcome.is_kept),
        margin=max(MARGIN, median(trial.outcome.doubt for trial in history)),
    )


def _beside(trial: Trial, full: Latency) -> tuple[DenseArchitecture, Latency]:
    """What was measured, as it would have been in the run that measured `full`, the last one.

    A relative budget is a ratio to the full model of the same run, so earlier runs are scaled by how much slower or
    faster that model was then. An absolute budget takes times as they were.
    """
    latency = trial.outcome.latency
    if all(budget.fraction for budget in trial.outcome.budgets):
        latency = latency.as_when(trial.outcome.full, full)
    return trial.candidate.dense, latency
