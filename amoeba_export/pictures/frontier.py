"""A frontier as a page draws it: where every mark goes. Colours and type are those of the page."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

from amoeba_export.ir.frontier import Frontier, FrontierPoint
from amoeba_export.pictures.axes import Scale, Tick, linear_axis, ratio_axis
from amoeba_export.quantities import milliseconds, percent

LEFT, RIGHT, TOP, BOTTOM = 46.0, 14.0, 14.0, 40.0
MOST_COLOURS = 6
LabelPlace = Literal["right", "above", "below"]
NO_NAMES: Mapping[tuple[str, str], str] = MappingProxyType({})


@dataclass(frozen=True, slots=True)
class Mark:
    """A point.

    Attributes:
        colour: Position of its precision, a class on the page; None for what is dominated.
        number: Of a distinct choice on the frontier.
        whole: The full model.
        latency: Ends of its latency's error bar, in pixels; None where there is none.
        quality: The same of its quality.
        label, label_at: Beside a full model, and what has a name.
    """

    x: float
    y: float
    colour: int | None
    title: str
    number: int | None = None
    whole: bool = False
    chosen: bool = False
    latency: tuple[float, float] | None = None
    quality: tuple[float, float] | None = None
    label: str = ""
    label_at: LabelPlace = "right"


@dataclass(frozen=True, slots=True)
class Line:
    """What one precision can do, as a polyline."""

    colour: int
    points: str


@dataclass(frozen=True, slots=True)
class Limit:
    """A budget: a vertical line at `x` or a horizontal one at `y`."""

    label: str
    x: float | None = None
    y: float | None = None


@dataclass(frozen=True, slots=True)
class FrontierPicture:
    """Latency to the right, quality upwards or downwards as its axis says."""

    title: str
    width: float
    height: float
    x_label: str
    y_label: str
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]
    lines: tuple[Line, ...]
    marks: tuple[Mark, ...]
    limits: tuple[Limit, ...]
    left: float = LEFT
    right: float = RIGHT
    top: float = TOP
    bottom: float = BOTTOM


def frontier_picture(
    frontier: Frontier,
    *,
    width: float = 380.0,
    height: float = 320.0,
    names: Mapping[tuple[str, str], str] = NO_NAMES,
) -> FrontierPicture:
    """Where everything goes in a picture so large.

    Args:
        frontier: What is drawn.
        width: In pixels.
        height: In pixels.
        names: Of what was made of a point, by its precision and shape.
    """
    limits_ms = [limit.latency_ms for limit in frontier.limits if limit.latency_ms]
    floors = [limit.quality for limit in frontier.limits if limit.quality is not None]
    shown = list(visible(frontier))
    x_ticks, x_of = ratio_axis([*(one.latency_ms for one in shown), *limits_ms], LEFT, width - RIGHT)
    values = [one.quality for one in shown] + floors
    axis = ratio_axis if frontier.quality_metric == "perplexity" else linear_axis
    y_ticks, y_of = axis(values, height - BOTTOM, TOP)
    colours = {dtype: i % MOST_COLOURS for i, dtype in enumerate(frontier.dtypes)}
    lines = []
    for dtype in frontier.dtypes:
        line = [one for one in frontier.line(dtype) if one in shown]
        path = " ".join(f"{x_of(one.latency_ms):.1f},{y_of(one.quality):.1f}" for one in line)
        lines.append(Line(colours[dtype], path))
    places = _Places(x_of, y_of, width - RIGHT)
    marks = [_mark(frontier, one, colours[one.dtype], places, names.get((one.dtype, one.shape), "")) for one in shown]
    return FrontierPicture(
        title=f"{frontier.model} on {frontier.target}",
        width=width,
        height=height,
        x_label=f"{frontier.metric} p{frontier.percentile}, ms (logarithmic)",
        y_label=f"{frontier.quality_metric}, {'higher' if frontier.higher_is_better else 'lower'} is better",
        x_ticks=x_ticks,
        y_ticks=y_ticks,
        lines=tuple(lines),
        marks=tuple(sorted(marks, key=lambda mark: (mark.chosen, mark.whole, mark.number is not None))),
        limits=tuple(
            Limit(
                limit.label,
                x_of(limit.latency_ms) if limit.latency_ms else None,
                y_of(limit.quality) if limit.quality is not None else None,
            )
            for limit in frontier.limits
        ),
    )


def visible(frontier: Frontier) -> Iterable[FrontierPoint]:
    """Points that a picture has room for: none that is much worse than the worst of the frontier."""
    worst = max((frontier.badness(one) for one in frontier.points if one.on_frontier or one.is_whole), default=math.inf)
    best = min((frontier.badness(one) for one in frontier.points), default=0.0)
    return (one for one in frontier.points if frontier.badness(one) <= worst + 0.1 * (worst - best) or one.chosen)


def label_place(frontier: Frontier, point: FrontierPoint) -> LabelPlace:
    """Right of a mark, unless a full model is there: then below, or above where one or its label is there, too."""
    slower = sorted(frontier.wholes, key=lambda one: one.latency_ms)
    if point in slower:
        slower = slower[slower.index(point) + 1 :]
    near = [other for other in slower if point.latency_ms <= other.latency_ms <= 1.35 * point.latency_ms]
    if not near:
        return "right"
    beside = label_place(frontier, near[0])
    if beside != "right":
        return "below" if beside == "above" else "above"
    return "below" if all(frontier.badness(other) >= frontier.badness(point) - 0.05 for other in near) else "above"


def told(frontier: Frontier, point: FrontierPoint) -> str:
    """One point in words."""
    error = f" ± {percent(point.latency_error)}" if point.latency_error else ""
    spread = f" ± {point.quality_error:.2g}" if point.quality_error else ""
    number = f"{point.number}: " if point.number else ""
    return (
        f"{number}{point.name}, {milliseconds(point.latency_ms)}{error} ({point.latency_source}), "
        f"{frontier.quality_metric} {point.quality:.4g}{spread} ({point.quality_source})"
    )


@dataclass(frozen=True, slots=True)
class _Places:
    """From figures to pixels."""

    x_of: Scale
    y_of: Scale
    right_end: float


def _mark(frontier: Frontier, point: FrontierPoint, colour: int, places: _Places, name: str) -> Mark:
    x_of, y_of, right_end = places.x_of, places.y_of, places.right_end
    label = ": ".join(part for part in (point.dtype if point.is_whole else "", name) if part)
    latency = quality = None
    if point.number and point.latency_error:
        low, high = (point.latency_ms * factor for factor in (1 - point.latency_error, 1 + point.latency_error))
        latency = max(LEFT, x_of(max(low, 0.01 * point.latency_ms))), min(right_end, x_of(high))
    if point.number and point.quality_error:
        quality = y_of(point.quality - point.quality_error), y_of(point.quality + point.quality_error)
    return Mark(
        x=x_of(point.latency_ms),
        y=y_of(point.quality),
        colour=colour if point.on_frontier else None,
        title=told(frontier, point),
        number=point.number,
        whole=point.is_whole,
        chosen=point.chosen,
        latency=latency,
        quality=quality,
        label=label,
        label_at=label_place(frontier, point) if x_of(point.latency_ms) < right_end - 16 - 7 * len(label) else "above",
    )
