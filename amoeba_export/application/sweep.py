"""The frontier without a budget: every precision searched, its distinct choices numbered and kept to be picked from."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from amoeba_export.application.costs import device_facts, is_measured, make_predictor
from amoeba_export.application.frontier import Searches, frontier_of
from amoeba_export.application.problem import problem_of
from amoeba_export.application.selection import with_strategy
from amoeba_export.application.session import Session
from amoeba_export.application.wholes import Whole, measure_wholes
from amoeba_export.backends import Subject, measure_latency
from amoeba_export.cache.kinds import FRONTIERS
from amoeba_export.errors import NothingFits, NothingLoads, NothingToPick, TargetError, UsageError
from amoeba_export.ir import Budget, DenseArchitecture, Latency, SubnetPlan
from amoeba_export.ir.frontier import Frontier, FrontierPoint
from amoeba_export.reading import read_json_object
from amoeba_export.search import Candidate, SearchResult, Seen, quality_surface, search_plan

FRONTIER_NAME = "frontier.json"

SHARES = (1.0, 0.6, 0.36, 0.2)
"""Of the full model's latency: the budgets that the search layer by layer fills, and spreads its answers below each."""

Measured = Mapping[str, Sequence[tuple[DenseArchitecture, Latency]]]
"""What was measured in each precision."""


@dataclass(frozen=True, kw_only=True)
class Pick:
    """One numbered choice of a frontier.

    Attributes:
        session: With its plan, its precision and the strategy that it was derived with.
        frontier: What it was taken from.
        wholes: The full model in each precision.
    """

    session: Session
    frontier: Frontier
    point: FrontierPoint
    plan: SubnetPlan
    wholes: tuple[Whole, ...]


def make_frontier(session: Session, *, measure: int = 0) -> Frontier:
    """The frontier of every precision that may be chosen, its numbered choices kept for `pick`.

    Args:
        session: With a target. Its budgets are lines in the picture and restrict nothing.
        measure: So many of the subnets on the frontier are measured, in one run with the full models.

    Raises:
        UsageError: `measure` on a target that is an estimate.
        TargetError: The target cannot be used.
    """
    if measure and not is_measured(session.target):
        raise UsageError(
            f"--measure needs a device, and the latencies of '{session.target.name}' are estimates.",
            next_step="Leave --measure out, or name a target that is measured.",
        )
    wholes = measure_wholes(session)
    session = with_strategy(session)
    searches = _search_all(session, wholes)
    frontier = frontier_of(session, wholes, searches)
    if measure:
        wholes, measured = _measure(session, wholes, _spread(frontier, measure), searches)
        searches = _search_all(session, wholes, measured)
        frontier = frontier_of(session, wholes, searches)
    _keep(session, frontier, searches)
    return frontier


def pick(session: Session, number: int) -> Pick:
    """Choice `number` of the frontier that was last made for the same request; it is made now if none was.

    Raises:
        NothingToPick: The frontier has no such number.
    """
    wholes = measure_wholes(session)
    session = with_strategy(session)
    facts = _facts(session)
    folder = session.cache.get(FRONTIERS, facts, progress=session.progress)
    if folder is None:
        session.progress.note("No frontier is kept for these settings: it is made now.")
        make_frontier(session)
        folder = session.cache.get(FRONTIERS, facts, progress=session.progress)
        assert folder is not None, "it was put there"
    path = folder / FRONTIER_NAME
    frontier = Frontier.from_json(read_json_object(path, what="The frontier"), where=path)
    point = next((one for one in frontier.numbered if one.number == number), None)
    if point is None:
        raise NothingToPick(number, len(frontier.numbered))
    plan_path = folder / _plan_name(number)
    plan = SubnetPlan.from_json(read_json_object(plan_path, what="The plan"), where=str(plan_path))
    session.progress.note(
        f"Number {number} of the frontier: {point.name}, {point.latency_ms:.4g} ms, "
        f"{frontier.quality_metric} {point.quality:.4g}."
    )
    settings = dataclasses.replace(session.settings, plan=plan, dtype=point.dtype)
    points = tuple(dataclasses.replace(one, chosen=one is point) for one in frontier.points)
    return Pick(
        session=session.with_settings(settings),
        frontier=dataclasses.replace(frontier, points=points),
        point=point,
        plan=plan,
        wholes=wholes,
    )


def _search_all(session: Session, wholes: Sequence[Whole], measured: Measured | None = None) -> Searches:
    """Every precision that may be chosen, with its own cost table. What the runtime cannot load is left out, and said.

    Args:
        session: With a strategy.
        wholes: The one that relative budgets refer to first.
        measured: Subnets measured in the run of `wholes`.
    """
    candidates = [one for one in wholes if one.dtype in session.settings.dtypes]
    if quality_surface(session.strategy).metric not in ("loss", "perplexity"):
        candidates = candidates[:1]  # what rounding costs is known as a loss, and cannot be weighed
    found: dict[str, list[SearchResult]] = {}
    for one in candidates:
        predictor = make_predictor(session.in_dtype(one.dtype))
        seen = Seen(full=wholes[0].latency)
        if is_measured(session.target):
            subnets = (measured or {}).get(one.dtype, ())
            seen = dataclasses.replace(seen, measured=((session.full, one.latency), *subnets))
        for budget in _budgets(session):
            settings = dataclasses.replace(session.settings, budgets=(budget,), dtype=one.dtype)
            problem = problem_of(session.with_settings(settings), session.strategy)
            try:
                result = search_plan(problem, predictor, seen)
            except (NothingFits, NothingLoads) as error:
                session.progress.note(f"Nothing in {one.dtype} is within {budget.fraction:.0%}. {error.what}")
                continue
            found.setdefault(one.dtype, []).append(result)
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
    return next(
        one
        for search in searches[point.dtype]
        for one in search.candidates
        if (str(one.shape), one.policy) == (point.shape, point.policy)
    )


def _measure(
    session: Session, wholes: Sequence[Whole], points: Sequence[FrontierPoint], searches: Searches
) -> tuple[tuple[Whole, ...], Measured]:
    """Full models and subnets in one run. A subnet that fails is left out, and said. Raises `TargetError`."""
    dense = [_candidate(searches, point).dense for point in points]
    subjects = [Subject(dense=session.full, dtype=one.dtype, label=f"the full model in {one.dtype}") for one in wholes]
    subjects += [
        Subject(dense=one, dtype=point.dtype, label=point.name) for one, point in zip(dense, points, strict=True)
    ]
    session.progress.note(f"Measuring {len(points)} subnets of the frontier beside {len(wholes)} full models.")
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


def _keep(session: Session, frontier: Frontier, searches: Searches) -> None:
    """In place of the last one of the same request, with the plan of every number."""

    def write(folder: Path) -> None:
        (folder / FRONTIER_NAME).write_text(json.dumps(frontier.to_json(), allow_nan=False), encoding="utf-8")
        for point in frontier.numbered:
            plan = session.supernet.full_plan() if point.is_whole else _candidate(searches, point).make_plan()
            text = json.dumps(plan.to_json(), allow_nan=False)
            (folder / _plan_name(point.number or 0)).write_text(text, encoding="utf-8")

    session.cache.put(FRONTIERS, _facts(session), write, again=True)


def _facts(session: Session) -> dict[str, object]:
    """What a frontier is looked up by: all that its numbers depend on but the figures of cost tables."""
    settings, strategy = session.settings, session.supernet.strategy
    return {
        **device_facts(session.supernet, session.target, settings.workload),
        "model": session.supernet.identity,
        "inputs": [item.sha256 for item in session.supernet.inputs],
        "strategy": strategy.identity if strategy else None,
        "metric": [settings.metric, settings.percentile],
        "dtypes": list(settings.dtypes),
        "formats": list(settings.formats),
        "policy": settings.policy,
        "memory_limit_mb": settings.memory_limit_mb,
    }


def _plan_name(number: int) -> str:
    return f"plan-{number}.json"
