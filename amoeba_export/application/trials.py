"""What the closed loop does next, from what it built and measured: decisions alone, no device is asked here."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median

from amoeba_export.application.outcome import Outcome
from amoeba_export.application.session import Session
from amoeba_export.errors import NothingFits
from amoeba_export.ir import DenseArchitecture, Latency, SubnetPlan
from amoeba_export.search import Candidate, Found, SearchResult, Seen

MAX_BUILDS = 6
"""Subnets that are built and measured before the best of them is taken, or none."""

GOOD_USE = 0.97
"""A subnet that keeps the budget and uses this share of it is not worth another build."""


MARGIN = 0.02
"""The share of a budget that predictions leave free; on a noisy machine, as much as cannot be told apart. Where nothing
is that far below the budget, less."""


@dataclass(frozen=True, kw_only=True)
class Choice:
    """What was chosen: a precision, and the best candidate in it.

    Attributes:
        session: With this precision, and with the strategy that the choice rests on.
        found: The search of this precision.
    """

    session: Session
    found: Found

    @property
    def search(self) -> SearchResult:
        """What it was chosen from."""
        return self.found.search

    @property
    def candidate(self) -> Candidate:
        """The choice."""
        return self.found.search.best

    @property
    def key(self) -> tuple[str, DenseArchitecture]:
        """Choices that share it are the same artifact to the loop."""
        return self.found.dtype, self.candidate.dense


@dataclass(frozen=True, kw_only=True)
class Trial:
    """A choice that was built and measured.

    Attributes:
        expected_ms: What the search predicted, in terms of the run that measured it: where that run was slower for the
            full model than the search took it to be, this is raised by as much.
    """

    choice: Choice
    plan: SubnetPlan
    outcome: Outcome
    expected_ms: float


@dataclass(frozen=True, kw_only=True)
class Step:
    """What comes next: build `choice`, or stop."""

    choice: Choice
    build: bool


def next_step(history: Sequence[Trial], choose: Callable[[Sequence[Trial]], Choice]) -> Step:
    """Build what is chosen in the light of `history`, until a budget is kept and used, or nothing is new.

    Args:
        history: Every trial, in order.
        choose: The search, given what was measured. Raises `NothingFits`.

    Raises:
        NothingFits: By prediction, before anything was built.
    """
    last = history[-1] if history else None
    if last and last.outcome.is_kept and last.outcome.use >= GOOD_USE:
        return Step(choice=last.choice, build=False)
    try:
        choice = choose(history)
    except NothingFits:
        if last is None:
            raise
        return Step(choice=last.choice, build=False)
    is_new = all(trial.choice.key != choice.key for trial in history)
    return Step(choice=choice, build=is_new and len(history) < MAX_BUILDS)


def best_of(history: Sequence[Trial]) -> Trial:
    """The best trial that is shown to keep the budget; where none is, the one that takes least of it."""
    kept = [trial for trial in history if trial.outcome.is_kept]
    if kept:
        return min(kept, key=lambda trial: (trial.choice.found.badness, trial.outcome.use))
    return min(history, key=lambda trial: trial.outcome.use)


def seen_in(
    history: Sequence[Trial], dtype: str, wholes: Mapping[str, Latency], uncut: DenseArchitecture, *, relative: bool
) -> Seen:
    """What the next search in `dtype` learns from what was measured.

    A relative budget is a ratio to the full model of the same run, so earlier runs are scaled by how much slower or
    faster that model was then. An absolute budget takes times as they were.

    Args:
        history: The trials so far.
        dtype: The precision to search.
        wholes: The full model in each precision, from one run; relative budgets refer to the first one.
        uncut: The full model.
        relative: Whether all budgets are shares of the full model.
    """
    reference = next(iter(wholes.values()))
    full = history[-1].outcome.full if history else reference

    def now(latency: Latency, then: Latency) -> Latency:
        return latency.as_when(then, full) if relative else latency

    own = full if wholes[dtype] is reference else now(wholes[dtype], reference)
    doubts = [trial.outcome.doubt for trial in history if trial.outcome.has_interval]
    return Seen(
        full=full,
        measured=(
            (uncut, own),
            *(
                (trial.choice.candidate.dense, now(trial.outcome.latency, trial.outcome.full))
                for trial in history
                if trial.choice.found.dtype == dtype
            ),
        ),
        refused=tuple(
            trial.choice.candidate.dense
            for trial in history
            if trial.choice.found.dtype == dtype and not trial.outcome.is_kept
        ),
        margin=max(MARGIN, median(doubts)) if doubts else MARGIN,
    )
