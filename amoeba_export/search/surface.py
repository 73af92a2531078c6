"""How good a shape is, from the few shapes that were measured."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from amoeba_export.ir import Shape, Strategy
from amoeba_export.ir.metric import KEPT_WEIGHTS, Mode, mode_of

QualitySource = Literal["measured", "interpolated", "proxy", "refitted", "predicted"]
"""`proxy`: the strategy has no measured quality, and the kept share of the weights stands in for it. `refitted`:
measured of the refitted shape; `predicted`: from other shapes that were refitted."""


class Quality(NamedTuple):
    """A figure, and where it comes from."""

    value: float
    source: QualitySource


@dataclass(frozen=True, kw_only=True)
class QualitySurface:
    """Quality over depth and a second coordinate that grows with what is kept (the width, say).

    Along the coordinate, between the measured points of a depth: a monotone cubic (Fritsch and Butland 1984), which
    passes through the points, bends as they do, and never overshoots them. Between two measured depths: a straight
    line, its position not by layer count but by the strategy's own metric of each depth order, where that metric lies
    between its neighbours': dropping the tenth layer may hurt more than the ninth. Measured values stay what they are,
    also where they contradict monotony. There is no extrapolation.

    Attributes:
        metric: What the values are.
        rows: Measured depth -> (coordinate, value) by increasing coordinate.
        depth_metric: Depth -> metric of its layers at full width, for the position between measured depths.
    """

    metric: str
    rows: Mapping[int, Sequence[tuple[float, float]]]
    depth_metric: Mapping[int, float] = field(default_factory=dict)

    @property
    def mode(self) -> Mode:
        """Which values are the better ones."""
        return mode_of(self.metric)

    def at(self, depth: int, coordinate: float) -> Quality | None:
        """The quality there, or None outside of what was measured."""
        quality = self._at(depth, coordinate)
        if quality is not None and self.metric == KEPT_WEIGHTS:
            return Quality(quality.value, "proxy")
        return quality

    def _at(self, depth: int, coordinate: float) -> Quality | None:
        if depth in self.rows:
            return _along(self.rows[depth], coordinate)
        measured = sorted(self.rows)
        above = bisect_left(measured, depth)
        if above in (0, len(measured)):
            return None
        low, high = measured[above - 1], measured[above]
        ends = _along(self.rows[low], coordinate), _along(self.rows[high], coordinate)
        if ends[0] is None or ends[1] is None:
            return None
        share = self._share(low, depth, high)
        return Quality(ends[0].value + share * (ends[1].value - ends[0].value), "interpolated")

    def _share(self, low: int, depth: int, high: int) -> float:
        if all(known in self.depth_metric for known in (low, depth, high)):
            start, here, end = (self.depth_metric[known] for known in (low, depth, high))
            if start != end and 0 <= (here - start) / (end - start) <= 1:
                return (here - start) / (end - start)
        return (depth - low) / (high - low)


def quality_surface(
    strategy: Strategy, *, coordinate: Callable[[Shape], float] = lambda shape: shape.width
) -> QualitySurface:
    """The surface through the shapes that `strategy` measured, over `coordinate` (the width unless told otherwise).

    Points of a depth whose coordinate does not grow with the width are dropped, the wider one staying. Without any
    measured quality, the kept share of the layers' weights stands in, as `kept_weights`.
    """
    if not strategy.quality:
        depths = (strategy.num_layers - removed for removed in strategy.depth)
        rows = {depth: [(0.0, 0.0), (1.0, depth / strategy.num_layers)] for depth in depths}
        return QualitySurface(metric=KEPT_WEIGHTS, rows=rows)
    by_depth: dict[int, list[tuple[float, float]]] = {}
    for shape in sorted(strategy.quality, reverse=True):
        points = by_depth.setdefault(shape.depth, [])
        x = coordinate(shape)
        if not points or x < points[0][0]:
            points.insert(0, (x, strategy.quality[shape]))
    return QualitySurface(
        metric=strategy.quality_metric,
        rows=by_depth,
        depth_metric={strategy.num_layers - removed: value for removed, value in strategy.depth_metric.items()},
    )


def _along(points: Sequence[tuple[float, float]], x: float) -> Quality | None:
    """The monotone cubic through `points` at `x`."""
    i = bisect_left(points, x, key=lambda point: point[0])
    for near in (i - 1, i):
        if 0 <= near < len(points) and math.isclose(points[near][0], x, abs_tol=1e-9):
            return Quality(points[near][1], "measured")
    if i in (0, len(points)):
        return None
    (x0, y0), (x1, y1) = points[i - 1], points[i]
    h = x1 - x0
    slope = (y1 - y0) / h
    start, end = _slope_at(points, i - 1, slope), _slope_at(points, i, slope)
    t = (x - x0) / h
    value = (
        y0 * (1 + 2 * t) * (1 - t) ** 2
        + y1 * t * t * (3 - 2 * t)
        + h * start * t * (1 - t) ** 2
        + h * end * t * t * (t - 1)
    )
    return Quality(value, "interpolated")


def _slope_at(points: Sequence[tuple[float, float]], i: int, at_the_end: float) -> float:
    """Harmonic mean of the slopes on both sides of point `i`, 0 at a turn, `at_the_end` at the first and last point."""
    if i in (0, len(points) - 1):
        return at_the_end
    left, right = ((points[k + 1][1] - points[k][1]) / (points[k + 1][0] - points[k][0]) for k in (i - 1, i))
    if left * right <= 0:
        return 0.0
    return 2 * left * right / (left + right)
