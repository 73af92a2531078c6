"""The ways to say what a subnet is. Each knows what it would take, and how that is built; nobody else asks which."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Protocol

from amoeba_export.application.choose import Chooser
from amoeba_export.application.fit import Build, Fitted, fit_budget, fit_plan
from amoeba_export.application.frontier import frontier_of, listed
from amoeba_export.application.goal import fit_pick, fit_quality
from amoeba_export.application.manifest import reference_records
from amoeba_export.application.picks import pick, pick_quality
from amoeba_export.application.recovery import recovered
from amoeba_export.application.refits import with_named_refit
from amoeba_export.application.request import ResolvedRequest
from amoeba_export.application.selection import given_plan, with_strategy
from amoeba_export.application.session import Session
from amoeba_export.application.sweep import sweep
from amoeba_export.artifact import FullModelRecord, LatencyRecord
from amoeba_export.ir import SubnetPlan
from amoeba_export.ir.dtype import AUTO
from amoeba_export.ir.frontier import Frontier
from amoeba_export.search import SearchResult


@dataclass(frozen=True, kw_only=True)
class Chosen:
    """What would be built first.

    Attributes:
        session: With the precision and the strategy of the choice.
        search: What it was chosen from under a budget.
        reference: The uncut model in each precision, where there was a choice.
        frontier: What was looked at.
    """

    session: Session
    plan: SubnetPlan
    search: SearchResult | None = None
    reference: tuple[FullModelRecord, ...] = ()
    frontier: Frontier | None = None


class Way(Protocol):
    """One way to say what the subnet is."""

    def choose(self, session: Session) -> Chosen:
        """What would be built, by what is known beforehand."""

    def fit(self, session: Session, build: Build) -> tuple[Fitted, Frontier | None]:
        """What was built, measured and refitted, and what it was chosen among."""


def way_of(settings: ResolvedRequest) -> Way:
    """The way that `settings` take."""
    if settings.request.pick is not None:
        return Numbered(settings.request.pick)
    if not settings.is_search:
        return Given()
    return UnderBudget() if settings.budgets else GoodEnough()


class Given:
    """A shape or a plan says it."""

    def choose(self, session: Session) -> Chosen:
        """See `Way`."""
        session = with_strategy(session)
        return Chosen(session=session, plan=given_plan(session))

    def fit(self, session: Session, build: Build) -> tuple[Fitted, None]:
        """See `Way`."""
        session = with_strategy(session)
        session, plan = with_named_refit(session, given_plan(session))
        return recovered(fit_plan(session, plan, build), build), None


@dataclass(frozen=True)
class Numbered:
    """A number of a frontier."""

    number: int

    def choose(self, session: Session) -> Chosen:
        """See `Way`."""
        picked = pick(session, self.number)
        return Chosen(session=picked.session, plan=picked.plan, frontier=picked.frontier)

    def fit(self, session: Session, build: Build) -> tuple[Fitted, Frontier]:
        """See `Way`."""
        picked = pick(session, self.number)
        return fit_pick(picked, build), picked.frontier


class GoodEnough:
    """The fastest that keeps a limit of quality."""

    def choose(self, session: Session) -> Chosen:
        """See `Way`."""
        picked = pick_quality(sweep(session))
        reference = reference_records(picked.session, picked.wholes)
        return Chosen(session=picked.session, plan=picked.plan, reference=reference, frontier=picked.frontier)

    def fit(self, session: Session, build: Build) -> tuple[Fitted, Frontier]:
        """See `Way`."""
        return fit_quality(session, build)


class UnderBudget:
    """The best that keeps a limit of latency."""

    def choose(self, session: Session) -> Chosen:
        """See `Way`."""
        choose = Chooser(session)
        choice = choose()
        return Chosen(
            session=choice.session,
            plan=choice.candidate.make_plan(),
            search=choice.search,
            reference=reference_records(choice.session, choose.wholes),
            frontier=frontier_of(choice.session, choose.wholes, listed(choose.searches), choice.key),
        )

    def fit(self, session: Session, build: Build) -> tuple[Fitted, Frontier]:
        """See `Way`."""
        fitted = fit_budget(session, build)
        chosen = (fitted.session.dtype, fitted.plan.dense(session.architecture))
        frontier = frontier_of(fitted.session, fitted.wholes, listed(fitted.searches), chosen)
        return recovered(fitted, build), frontier


@dataclass(frozen=True, kw_only=True)
class Replay:
    """What an earlier export chose, and the figures that its manifest had. Nothing is searched or measured."""

    plan: SubnetPlan
    dtype: str | None = None
    latency: LatencyRecord | None = None
    quality: Mapping[str, float] | None = None
    reference: tuple[FullModelRecord, ...] = ()

    def settle(self, settings: ResolvedRequest) -> ResolvedRequest:
        """`settings` with nothing left to choose."""
        dtype = self.dtype if settings.dtype == AUTO else settings.dtype
        return replace(settings, plan=self.plan, dtype=dtype)

    def choose(self, session: Session) -> Chosen:
        """See `Way`."""
        return Given().choose(session)

    def fit(self, session: Session, build: Build) -> tuple[Fitted, None]:
        """See `Way`: as it was."""
        session, plan = with_named_refit(with_strategy(session), self.plan)
        build(session, plan)
        return Fitted(session=session, plan=plan), None
