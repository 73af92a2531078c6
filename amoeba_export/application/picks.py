"""Choices taken from a frontier: by number, or the fastest that is good enough."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path

from amoeba_export.application.costs import device_facts
from amoeba_export.application.problem import smaller_than_known
from amoeba_export.application.selection import with_strategy
from amoeba_export.application.session import Session
from amoeba_export.application.sweep import Swept, sweep
from amoeba_export.application.vocabulary import vocabulary_input
from amoeba_export.application.wholes import Whole, measure_wholes
from amoeba_export.artifact import sha256_file
from amoeba_export.cache.kinds import FRONTIERS
from amoeba_export.errors import InputError, NothingGoodEnough, NothingInMemory, NothingToPick
from amoeba_export.ir import SubnetPlan
from amoeba_export.ir.frontier import Frontier, FrontierLimit, FrontierPoint, numbered
from amoeba_export.ir.metric import KEPT_WEIGHTS, good_enough, mode_of, stricter
from amoeba_export.reading import read_json_object
from amoeba_export.refit import OFF

FRONTIER_NAME = "frontier.json"


@dataclass(frozen=True, kw_only=True)
class Pick:
    """One choice of a frontier.

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
    """The frontier of every precision that may be chosen, its numbered choices kept for `pick`. Raises as `sweep`."""
    swept = sweep(session, measure=measure)
    _keep(swept)
    return swept.frontier


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
        session.progress.note("The cache has no frontier for these settings: making one.")
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
    points = tuple(dataclasses.replace(one, chosen=one is point) for one in frontier.points)
    return _picked(session, dataclasses.replace(frontier, points=points), point, plan, wholes)


def pick_quality(swept: Swept, *, stricter_by: float = 0.0) -> Pick:
    """The fastest model of a frontier that is as good as its session asks, in a precision and in memory that it allows.

    Args:
        swept: With a limit of quality in its settings.
        stricter_by: How much better than the limit a cut must be said to be: by so much one was worse than that.

    Raises:
        NothingGoodEnough: Nothing is, not even the full model.
        NothingInMemory: Nothing is small enough for the memory.
    """
    frontier, session = swept.frontier, swept.session
    limit, mode = quality_limit(swept), mode_of(frontier.quality_metric)
    allowed = _allowed(session, frontier)
    least = stricter(limit, stricter_by, mode)
    good = [one for one in allowed if good_enough(one.quality, limit if one.is_whole else least, mode)]
    if not good:
        best = min(allowed, key=frontier.badness)
        raise NothingGoodEnough(frontier.quality_metric, limit, best.name, best.quality)
    point = min(good, key=lambda one: (one.latency_ms, frontier.badness(one)))
    session.progress.note(
        f"The fastest with {frontier.quality_metric} {limit:.4g} or better: {point.name}, {point.latency_ms:.4g} ms, "
        f"{frontier.quality_metric} {point.quality:.4g}."
    )
    line = FrontierLimit(label=f"{frontier.quality_metric} {limit:.4g}", quality=limit)
    points = (
        dataclasses.replace(one, chosen=one is point, fits=one.fits and good_enough(one.quality, limit, mode))
        for one in frontier.points
    )
    frontier = dataclasses.replace(
        frontier,
        limits=(*frontier.limits, line),
        points=numbered(points, mode=frontier.mode),
    )
    return _picked(session, frontier, point, swept.plan_of(point), swept.wholes)


def _allowed(session: Session, frontier: Frontier) -> list[FrontierPoint]:
    """What may be chosen, at least one. The other full models are there for comparison."""
    limit_mb = session.settings.memory_limit_mb
    points = [one for one in frontier.points if one.dtype in session.settings.dtypes]
    found = [one for one in points if limit_mb is None or one.memory_mb is None or one.memory_mb <= limit_mb]
    if limit_mb is not None and not found:
        raise NothingInMemory(limit_mb, smaller=smaller_than_known(session))
    return found


def quality_limit(swept: Swept) -> float:
    """The worst quality that is accepted; shares are of the full model in the precision that budgets refer to.

    Raises:
        InputError: The strategy knows no quality, and the share of kept weights stands in for it. Or it is a share of
            what is not known.
    """
    frontier, wanted = swept.frontier, swept.session.settings.quality
    assert wanted, "there is such a limit"
    if frontier.quality_metric == KEPT_WEIGHTS:
        raise quality_unknown()
    full = next((one.quality for one in frontier.wholes if one.dtype == frontier.reference_dtype), None)
    if full is None and wanted.value is None:  # what rounding costs is known as a loss alone
        raise InputError(
            f"The {frontier.quality_metric} of the full model in {frontier.reference_dtype} is not known, and a share "
            "of it is no limit.",
            next_step="Give the worst value that is accepted, with --quality.",
        )
    return wanted.resolve(full or 0.0, mode_of(frontier.quality_metric))


def quality_unknown() -> InputError:
    """A limit of quality where no quality is known."""
    return InputError(
        "The strategy has no measured quality, so a limit of it cannot be kept.",
        next_step="Measure it with 'amoeba evaluate --grid', or calibrate with 'amoeba calibrate'.",
    )


def _picked(
    session: Session, frontier: Frontier, point: FrontierPoint, plan: SubnetPlan, wholes: tuple[Whole, ...]
) -> Pick:
    settings = dataclasses.replace(session.settings, plan=plan, dtype=point.dtype)
    return Pick(
        session=session.with_settings(settings),
        frontier=frontier,
        point=point,
        plan=plan,
        wholes=wholes,
    )


def _keep(swept: Swept) -> None:
    """In place of the last one of the same request, with the plan of every number."""
    frontier, session = swept.frontier, swept.session

    def write(folder: Path) -> None:
        (folder / FRONTIER_NAME).write_text(json.dumps(frontier.to_json(), allow_nan=False), encoding="utf-8")
        for point in frontier.numbered:
            text = json.dumps(swept.plan_of(point).to_json(), allow_nan=False)
            (folder / _plan_name(point.number or 0)).write_text(text, encoding="utf-8")

    session.cache.put(FRONTIERS, _facts(session), write, again=True)


def _facts(session: Session) -> dict[str, object]:
    """What a frontier is looked up by: all that its numbers depend on but the figures of cost tables."""
    settings, strategy = session.settings, session.supernet.strategy
    return {
        **device_facts(session.supernet, session.target, settings.workload),
        "model": session.supernet.identity,
        "inputs": [item.sha256 for item in (*session.supernet.inputs, *vocabulary_input(session.supernet))],
        "strategy": strategy.identity if strategy else None,
        "metric": [settings.metric, settings.percentile],
        "dtypes": list(settings.dtypes),
        "formats": list(settings.formats),
        "policy": settings.policy,
        "refit": settings.refit != OFF,
        "rounding": settings.request.rounding,
        "seed": settings.request.seed,
        "calibration_data": [sha256_file(path) for path in settings.request.calibration_data],
        "memory_limit_mb": settings.memory_limit_mb,
    }


def _plan_name(number: int) -> str:
    return f"plan-{number}.json"
