"""The frontier without a budget: every precision searched, with what refits leave of the losses by cuts."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from amoeba_export.application.costs import make_predictor
from amoeba_export.application.frontier import Searches, frontier_of
from amoeba_export.application.problem import problem_of
from amoeba_export.application.prospects import (
    MOST_REFITS,
    Prospects,
    Searched,
    densified,
    measure_prospects,
    usual_strategy,
    weighs_refits,
)
from amoeba_export.application.selection import with_strategy
from amoeba_export.application.session import Session
from amoeba_export.application.wholes import Whole, measure_wholes
from amoeba_export.backends import Subject, measure_latency
from amoeba_export.errors import InputError, NothingFits, NothingLoads, TargetError, UsageError
from amoeba_export.ir import Budget, DenseArchitecture, Latency, Shape, Strategy, SubnetPlan
from amoeba_export.ir.frontier import Frontier, FrontierPoint
from amoeba_export.refit import OFF
from amoeba_export.search import Candidate, SearchResult, Seen, quality_surface, search_plan

SHARES = (1.0, 0.6, 0.36, 0.2)
"""Of the full model's latency: the budgets that the search layer by layer fills, and spreads its answers below each."""

Measured = Mapping[str, Sequence[tuple[DenseArchitecture, Latency]]]
"""What was measured in each precision."""


@dataclass(frozen=True, kw_only=True)
class Swept:
    """A frontier, and what it was made of.

    Attributes:
        session: With the strategy that it rests on.
    """

    session: Session
    wholes: tuple[Whole, ...]
    searches: Searches
    frontier: Frontier

    def plan_of(self, point: FrontierPoint) -> SubnetPlan:
        """The plan of one of the frontier's points."""
        if point.is_whole:
            return self.session.supernet.full_plan()
        return _candidate(self.searches, point).make_plan()


def sweep(session: Session, *, measure: int = 0) -> Swept:
    """Search every precision that may be chosen, without a limit.

    Where cuts are refitted, some that are spread over the frontier are, quickly and together; what that leaves of
    their losses predicts the others.

    Args:
        session: With a target. Its budgets are lines in the picture and restrict nothing.
        measure: So many of the subnets on the frontier are measured, in one run with the full models.

    Raises:
        UsageError: `measure` on a target that is an estimate.
        TargetError: The target cannot be used.
    """
    if measure and not session.is_measured:
        raise UsageError(
            f"--measure needs a device, and the latencies of '{session.target.name}' are estimates.",
            next_step="Leave --measure out, or name a target that is measured.",
        )
    wholes = measure_wholes(session)
    session = with_strategy(session)
    strategies: Mapping[str, Strategy] = {one.dtype: session.strategy for one in wholes}
    prospects = None
    if session.settings.refit != OFF and weighs_refits(session.strategy):
        prospects = _compare(session, wholes)
    if prospects is not None:
        prior = densified(session.strategy)
        strategies = {one.dtype: prospects.strategy(prior, one.dtype) for one in wholes}
    error = prospects.error if prospects else None
    searches = _search_all(session, wholes, strategies, prospects=prospects)
    frontier = frontier_of(session, wholes, searches, quality_error=error)
    if measure:
        wholes, measured = _measure(session, wholes, _spread(frontier, measure), searches)
        searches = _search_all(session, wholes, strategies, measured, prospects=prospects)
        frontier = frontier_of(session, wholes, searches, quality_error=error)
    return Swept(session=session, wholes=wholes, searches=searches, frontier=frontier)


def _compare(session: Session, wholes: Sequence[Whole]) -> Prospects | None:
    """Refit subnets that are spread over the frontier; None where there are none or the texts cannot be used."""
    prior = densified(session.strategy)
    as_cut = _search_all(session, wholes, {one.dtype: prior for one in wholes})
    expected = usual_strategy(prior)
    searches = _search_all(session, wholes, {one.dtype: expected for one in wholes})
    allowed = [one for one in wholes if one.dtype in session.settings.dtypes]  # what cuts compete with
    points = _spread(frontier_of(session, allowed, searches), MOST_REFITS)
    rise_of = {one.dtype: one.rise for one in wholes}
    chosen: dict[str, tuple[Searched, Candidate]] = {}
    for point in points:
        dense = _candidate(searches, point).dense
        candidate = next((one for one in _all(as_cut, point) if one.dense == dense), None)
        if candidate is not None:
            option = Searched(dtype=point.dtype, rise=rise_of[point.dtype], search=as_cut[point.dtype][0])
            chosen.setdefault(point.shape, (option, candidate))
    if not chosen:
        return None
    try:
        return measure_prospects(session, list(chosen.values()), prior.quality[Shape(prior.num_layers, 1.0)])
    except InputError as error:
        session.progress.note(f"Shapes are shown without a refit: {error.what}")
        return None


def _search_all(
    session: Session,
    wholes: Sequence[Whole],
    strategies: Mapping[str, Strategy],
    measured: Measured | None = None,
    *,
    prospects: Prospects | None = None,
) -> Searches:
    """Every precision that may be chosen, with its own cost table. What the runtime cannot load is left out, and said.

    Args:
        session: With a strategy.
        wholes: The one that relative budgets refer to first.
        strategies: What shapes are worth in each precision.
        measured: Subnets measured in the run of `wholes`.
        prospects: What the strategies rest on; the candidates then say so.
    """
    candidates = [one for one in wholes if one.dtype in session.settings.dtypes]
    if quality_surface(session.strategy).metric not in ("loss", "perplexity"):
        candidates = candidates[:1]  # what rounding costs is known as a loss, and cannot be weighed
    found: dict[str, list[SearchResult]] = {}
    for one in candidates:
        predictor = make_predictor(session.in_dtype(one.dtype))
        seen = Seen(full=wholes[0].latency)
        if session.is_measured:
            subnets = (measured or {}).get(one.dtype, ())
            seen = dataclasses.replace(seen, measured=((session.full, one.latency), *subnets))
        for budget in _budgets(session):
            settings = dataclasses.replace(session.settings, budgets=(budget,), dtype=one.dtype)
            problem = problem_of(session.with_settings(settings), strategies[one.dtype])
            try:
                result = search_plan(problem, predictor, seen)
            except (NothingFits, NothingLoads) as error:
                session.progress.note(f"Nothing in {one.dtype} is within {budget.fraction:.0%}. {error.what}")
                continue
            found.setdefault(one.dtype, []).append(prospects.told(result) if prospects else result)
    return found


def _budgets(session: Session) -> list[Budget]:
    """Limits that let everything through; for the search layer by layer, which fills its budget, several."""
    settings = session.settings
    shares = SHARES if settings.policy == "adaptive" else SHARES[:1]
    return [Budget(metric=settings.metric, percentile=settings.percentile, fraction=share) for share in shares]


def _spread(frontier: Frontier, number: int) -> list[FrontierPoint]:
    """So many of the numbered subnets, evenly."""
    subnets = [point for point in frontier.numbered if not point.is_whole]
    step = max(1.0, len(subnets) / number)
    return [subnets[int(i * step)] for i in range(min(number, len(subnets)))]


def _candidate(searches: Searches, point: FrontierPoint) -> Candidate:
    """What a search said of `point`."""
    return next(one for one in _all(searches, point) if (str(one.shape), one.policy) == (point.shape, point.policy))


def _all(searches: Searches, point: FrontierPoint) -> Iterator[Candidate]:
    return (one for search in searches[point.dtype] for one in search.candidates)


def _measure(
    session: Session, wholes: Sequence[Whole], points: Sequence[FrontierPoint], searches: Searches
) -> tuple[tuple[Whole, ...], Measured]:
    """Full models and subnets in one run. A subnet that fails is left out, and said. Raises `TargetError`."""
    dense = [_candidate(searches, point).dense for point in points]
    subjects = [Subject(dense=session.full, dtype=one.dtype, label=f"the full model in {one.dtype}") for one in wholes]
    subjects += [
        Subject(dense=one, dtype=point.dtype, label=point.name) for one, point in zip(dense, points, strict=True)
    ]
    session.progress.note(f"Measuring {len(points)} subnets of the frontier and {len(wholes)} full models.")
    results = measure_latency(subjects, session.settings.workload, target=session.target, progress=session.progress)
    now = []
    for whole, result in zip(wholes, results[: len(wholes)], strict=True):
        if isinstance(result, TargetError):
            raise result
        now.append(dataclasses.replace(whole, latency=result))
    measured: dict[str, list[tuple[DenseArchitecture, Latency]]] = {}
    for point, one, result in zip(points, dense, results[len(wholes) :], strict=True):
        if isinstance(result, TargetError):
            session.progress.warn(f"{point.name} was not measured. {result.what}")
        else:
            measured.setdefault(point.dtype, []).append((one, result))
    return tuple(now), measured
