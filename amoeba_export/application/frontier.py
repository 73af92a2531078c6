"""What searches looked at, as points of latency and quality: the data of every picture, table and pick."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence

from amoeba_export.application.problem import memory_mb, whole_quality
from amoeba_export.application.session import Session
from amoeba_export.application.wholes import Whole
from amoeba_export.ir import DenseArchitecture, Latency, Shape
from amoeba_export.ir.frontier import Frontier, FrontierLimit, FrontierPoint, LatencySource, numbered
from amoeba_export.ir.metric import Mode, after_rise, badness, is_higher_better, mode_of
from amoeba_export.search import Candidate, SearchResult

NEAR, NEAR_ON_FRONT = 0.05, 0.01
"""Points of one precision that are nearer to each other in latency are drawn as one: those of a depth, off its front,
and those on it."""

Taken = tuple[str, DenseArchitecture]
"""Precision and dims of a choice."""


Searches = Mapping[str, Sequence[SearchResult]]
"""Of each precision that was searched."""


def frontier_of(
    session: Session,
    wholes: Sequence[Whole],
    searches: Searches,
    chosen: Taken | None = None,
    *,
    quality_error: float | None = None,
) -> Frontier:
    """What `searches` looked at, beside the full model in every precision.

    Args:
        session: With the strategy that the searches rest on, if there was one.
        wholes: The one that relative budgets refer to first.
        searches: Precisions that were not searched have their full model alone.
        chosen: What was taken.
        quality_error: Of a loss that is predicted from refitted shapes, in nats; None where it is not known.
    """
    pairs = [(one, search) for one in wholes for search in searches.get(one.dtype, ())]
    metric = _judged_by(session, wholes, [search for _, search in pairs])
    limits = _limits(session, wholes[0].latency)
    points = [_whole_point(session, one, metric, wholes[0].latency, chosen) for one in wholes]
    found = [point for point in points if point is not None]
    for one, search in pairs:
        drawn = _points(session, one, search, limits, chosen)
        found += [_with_error(point, metric, quality_error) for point in drawn]
    settings = session.settings
    return Frontier(
        model=session.supernet.name,
        target=session.target.name,
        metric=settings.metric,
        percentile=settings.percentile,
        workload=settings.workload,
        quality_metric=metric,
        higher_is_better=is_higher_better(metric),
        reference_dtype=wholes[0].dtype,
        limits=limits,
        points=numbered(found, mode=mode_of(metric)),
    )


def listed(searches: Mapping[str, SearchResult]) -> Searches:
    """One search a precision."""
    return {dtype: (search,) for dtype, search in searches.items()}


def _limits(session: Session, reference: Latency) -> tuple[FrontierLimit, ...]:
    """Budgets that are about what the picture shows."""
    settings = session.settings
    lines = []
    for budget in settings.budgets:
        if (budget.metric, budget.percentile) == (settings.metric, settings.percentile):
            limit_ms = budget.limit_beside(reference)
            share = f"{100 * budget.fraction:g}%, " if budget.fraction else ""
            lines.append(FrontierLimit(label=f"{share}{limit_ms:.4g} ms", latency_ms=limit_ms))
    return tuple(lines)


def _judged_by(session: Session, wholes: Sequence[Whole], searches: Sequence[SearchResult]) -> str:
    """The quality metric."""
    if searches:
        return searches[0].quality_metric
    known = whole_quality(session, wholes[0])
    return known[0] if known else "loss"


def _whole_point(
    session: Session, whole: Whole, metric: str, reference: Latency, chosen: Taken | None
) -> FrontierPoint | None:
    """The full model in one precision; None where its quality is not known in terms of `metric`."""
    known = whole_quality(session, whole)
    if known is None or known[0] != metric:
        return None
    settings = session.settings
    is_first = whole.rise == 0 and whole.latency is reference
    if metric not in ("loss", "perplexity") and not is_first:
        return None
    occupied_mb, limit_mb = memory_mb(session.in_dtype(whole.dtype), session.full), settings.memory_limit_mb
    fits = all(budget.is_met(whole.latency, reference) for budget in settings.budgets)
    return FrontierPoint(
        dtype=whole.dtype,
        shape=str(Shape(session.architecture.num_layers, 1.0)),
        is_whole=True,
        latency_ms=whole.latency.of(settings.metric, settings.percentile),
        latency_error=whole.latency.uncertainty or 0.0,
        latency_source=whole.latency.source,
        quality=after_rise(metric, known[1], whole.rise),
        quality_source="measured",
        memory_mb=occupied_mb,
        fits=fits and (limit_mb is None or occupied_mb <= limit_mb),
        chosen=chosen == (whole.dtype, session.full),
    )


def _points(
    session: Session, whole: Whole, search: SearchResult, limits: Sequence[FrontierLimit], chosen: Taken | None
) -> list[FrontierPoint]:
    """The subnets of one search that a picture needs; those that break the memory limit are not among them."""
    limit_mb = session.settings.memory_limit_mb
    most_ms = min((limit.latency_ms for limit in limits if limit.latency_ms), default=math.inf)
    kept = [
        one
        for one in search.candidates
        if one.dense != session.full and (limit_mb is None or one.memory_mb is None or one.memory_mb <= limit_mb)
    ]
    points = {
        id(one): FrontierPoint(
            dtype=whole.dtype,
            shape=str(one.shape),
            policy=one.policy,
            latency_ms=one.predicted_ms,
            latency_error=one.uncertainty,
            latency_source=_source(session, one),
            quality=after_rise(search.quality_metric, one.quality.value, whole.rise),
            quality_source=one.quality.source,
            memory_mb=one.memory_mb,
            fits=one.fits and one.predicted_ms <= most_ms,
            chosen=chosen == (whole.dtype, one.dense),
        )
        for one in kept
    }
    return _thinned(kept, points, search.mode)


def _with_error(point: FrontierPoint, metric: str, error: float | None) -> FrontierPoint:
    if error is None or point.quality_source != "predicted":
        return point
    half_width = point.quality * math.expm1(error) if metric == "perplexity" else error
    return dataclasses.replace(point, quality_error=half_width)


def _thinned(kept: Sequence[Candidate], points: Mapping[int, FrontierPoint], mode: Mode) -> list[FrontierPoint]:
    """Near copies off the precision's own front are left out: a picture shows the same without them."""
    last_ms: dict[int, float] = {}  # of each depth; 0: of the front
    least = float("inf")
    shown = []
    for one in sorted(kept, key=lambda one: (one.predicted_ms, badness(one.quality.value, mode))):
        point = points[id(one)]
        line, near = one.shape.depth, NEAR
        if badness(one.quality.value, mode) < least:
            least, line, near = badness(one.quality.value, mode), 0, NEAR_ON_FRONT
        if point.chosen or one.predicted_ms >= (1 + near) * last_ms.get(line, 0.0):
            shown.append(point)
            last_ms[line] = one.predicted_ms
    return shown


def _source(session: Session, one: Candidate) -> LatencySource:
    if not session.is_measured:
        return session.backend.source
    return "predicted" if one.uncertainty else "measured"
