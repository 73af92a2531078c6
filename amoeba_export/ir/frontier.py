"""Latency against quality of everything that was looked at on one target: what a picture, a table and a pick need."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from amoeba_export.errors import DamagedFile
from amoeba_export.ir.latency import Metric, Workload
from amoeba_export.ir.metric import Mode, badness
from amoeba_export.ir.pareto import pareto_front
from amoeba_export.reading import check_schema, decode

FRONTIER_SCHEMA = 1

ALIKE = 0.03
"""Models on the frontier whose latencies differ by less than this share are one choice: noise is as large."""

MOST_NUMBERED = 12
"""Choices between the fastest and the slowest, besides full models: as many as a table shows."""

LatencySource = Literal["measured", "predicted", "recorded", "analytic"]
QualitySource = Literal["measured", "refitted", "interpolated", "predicted", "proxy"]


@dataclass(frozen=True, slots=True, kw_only=True)
class FrontierPoint:
    """One model: a shape in a precision.

    Attributes:
        number: 1 for the fastest of the distinct choices on the frontier, 2 for the next; None for all other points.
        dtype: The precision.
        shape: DEPTHxWIDTH.
        policy: `uniform` or `adaptive`.
        is_whole: Whether it is the full model.
        latency_ms: Latency, in the frontier's metric at its percentile.
        latency_error: Relative half-width of `latency_ms`; 0 if it was measured.
        latency_source: `measured` on a graph with these dims; `predicted` by a cost table; else the kind of estimate.
        quality: Quality, in the frontier's metric, with the rise from rounding.
        quality_error: Half-width of `quality`; None if it is not known.
        quality_source: The source of `quality`.
        memory_mb: Predicted memory on the target; None if it is not known.
        on_frontier: Whether no other point beats it: at least as fast and as good, and better in one of the two.
        fits: Whether it keeps the limits of the search and is on the right side of every line.
        chosen: Whether a search chose it.
    """

    number: int | None = None
    dtype: str
    shape: str
    policy: str = "uniform"
    is_whole: bool = False
    latency_ms: float
    latency_error: float = 0.0
    latency_source: LatencySource = "predicted"
    quality: float
    quality_error: float | None = None
    quality_source: QualitySource = "interpolated"
    memory_mb: float | None = None
    on_frontier: bool = False
    fits: bool = True
    chosen: bool = False

    @property
    def name(self) -> str:
        """`23x0.88 in int8`, `full model in int8`."""
        return f"{'full model' if self.is_whole else self.shape} in {self.dtype}"


@dataclass(frozen=True, slots=True, kw_only=True)
class FrontierLimit:
    """A line in the picture: a budget of latency or of quality; exactly one of the two is set.

    Attributes:
        label: Its text in the picture.
        latency_ms: A limit on the latency.
        quality: A limit on the quality.
    """

    label: str
    latency_ms: float | None = None
    quality: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Frontier:
    """What was looked at on one target, under one workload.

    Attributes:
        model: The supernet, as in the command.
        target: The target's name.
        metric: The metric of `latency_ms`.
        percentile: Percentile of the latencies.
        workload: The workload of the latencies.
        quality_metric: The metric of `quality`.
        higher_is_better: Whether a higher `quality` is better.
        reference_dtype: Precision of the full model that budgets in percent refer to.
        limits: Lines in the picture.
        points: The points, the fastest first, without near copies.
        schema_version: Raised when a key changes its meaning.
    """

    model: str
    target: str
    metric: Metric
    percentile: int
    workload: Workload
    quality_metric: str
    higher_is_better: bool
    reference_dtype: str
    limits: tuple[FrontierLimit, ...]
    points: tuple[FrontierPoint, ...]
    schema_version: int = FRONTIER_SCHEMA

    @property
    def dtypes(self) -> tuple[str, ...]:
        """Precisions that have points, in the order of their full models: the slowest first."""
        wholes = [point.dtype for point in reversed(self.points) if point.is_whole]
        return tuple(dict.fromkeys((*wholes, *(point.dtype for point in reversed(self.points)))))

    @property
    def numbered(self) -> tuple[FrontierPoint, ...]:
        """The distinct choices on the frontier, the fastest first."""
        return tuple(point for point in self.points if point.number is not None)

    @property
    def wholes(self) -> tuple[FrontierPoint, ...]:
        """The full model in each precision."""
        return tuple(point for point in self.points if point.is_whole)

    @property
    def chosen(self) -> FrontierPoint | None:
        """What a search took, where there was one."""
        return next((point for point in self.points if point.chosen), None)

    @property
    def mode(self) -> Mode:
        """Which qualities are the better ones."""
        return "max" if self.higher_is_better else "min"

    def badness(self, point: FrontierPoint) -> float:
        """Quality such that smaller is better."""
        return badness(point.quality, self.mode)

    def line(self, dtype: str) -> tuple[FrontierPoint, ...]:
        """Points of one precision that no other point of it beats, the fastest first."""
        own = [point for point in self.points if point.dtype == dtype]
        return tuple(own[i] for i in pareto_front([(one.latency_ms, self.badness(one)) for one in own]))

    def to_json(self) -> dict[str, Any]:
        """The JSON object, `schema_version` first. Rounded: the last bit of a machine's arithmetic does not show."""
        data = dataclasses.asdict(self)
        return {"schema_version": data.pop("schema_version"), **_rounded(data)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any], *, where: str | Path) -> Frontier:
        """Read what `to_json` wrote.

        Raises:
            InputError: It is of another version.
            DamagedFile: It is something else.
        """
        check_schema(data, FRONTIER_SCHEMA, what="frontier", where=where, next_step="Run 'amoeba frontier' again.")
        try:
            return decode(cls, data)
        except ValueError as error:
            raise DamagedFile(where, f"it is not a frontier ({error})") from error


def numbered(points: Iterable[FrontierPoint], *, mode: Mode) -> tuple[FrontierPoint, ...]:
    """`points`, the fastest first, with the frontier found and its distinct choices numbered.

    Of points on the frontier that are within `ALIKE` of each other in latency (or further, where that would be more
    than `MOST_NUMBERED` choices), the best has the number. The fastest, full models and what was chosen always have
    one.
    """
    ordered = sorted(points, key=lambda one: (one.latency_ms, one.dtype, one.shape))
    front = pareto_front([(one.latency_ms, badness(one.quality, mode)) for one in ordered])
    shown = _distinct([ordered[i] for i in front], front)
    numbers = {i: number for number, i in enumerate(shown, start=1)}
    return tuple(
        dataclasses.replace(one, number=numbers.get(i), on_frontier=i in set(front)) for i, one in enumerate(ordered)
    )


def merged(frontiers: Sequence[Frontier]) -> Frontier:
    """What any of them looked at, with the lines of all; they are of one model, target, metric and workload.

    A point that several have is the one that was chosen, or else the first.
    """
    points: dict[tuple[str, str, str], FrontierPoint] = {}
    for frontier in frontiers:
        for point in frontier.points:
            key = (point.dtype, point.shape, point.policy)
            if key not in points or (point.chosen and not points[key].chosen):
                points[key] = point
    first = frontiers[0]
    return dataclasses.replace(
        first,
        limits=tuple(dict.fromkeys(limit for frontier in frontiers for limit in frontier.limits)),
        points=numbered(points.values(), mode=first.mode),
    )


def _distinct(front: Sequence[FrontierPoint], positions: Sequence[int]) -> list[int]:
    """Positions of the points that get a number, the fastest first. `front` is the fastest first."""
    if not front:
        return []
    step = max(ALIKE, (front[-1].latency_ms / front[0].latency_ms) ** (1 / MOST_NUMBERED) - 1)
    kept: list[int] = []
    last = front[-1]
    for point, position in zip(reversed(front), reversed(positions), strict=True):
        is_near = bool(kept) and point.latency_ms * (1 + step) > last.latency_ms
        is_end = position == positions[0]
        if is_near and not (point.is_whole or point.chosen or is_end):
            continue
        if is_near and is_end and not (last.is_whole or last.chosen):
            kept.pop()  # the fastest stands for what is near it
        kept.append(position)
        last = point
    return kept[::-1]


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return round(value, 6)
    if isinstance(value, dict):
        return {key: _rounded(one) for key, one in value.items()}
    return [_rounded(one) for one in value] if isinstance(value, (list, tuple)) else value
