"""Where the marks of the page's pictures go. Coordinates are those of an SVG 380 wide; colours are the page's."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from amoeba_export.builds.outcome import BuildReport, CandidatePoint, EntryOutcome, PlanRecord

WIDTH, HEIGHT = 380.0, 250.0
LEFT, RIGHT, TOP, BOTTOM = 46.0, 10.0, 12.0, 38.0


@dataclass(frozen=True, slots=True)
class Tick:
    """A labelled position on an axis."""

    at: float
    label: str


@dataclass(frozen=True, slots=True)
class Mark:
    """A point. `kind` is its class on the page: `chosen`, `front`, `fits` or `over`; `title` is read on hovering."""

    x: float
    y: float
    kind: str
    title: str
    label: str = ""


@dataclass(frozen=True, slots=True)
class Limit:
    """The vertical line of a budget."""

    x: float
    label: str


@dataclass(frozen=True, slots=True)
class ParetoPlot:
    """Latency against quality of everything that was looked at for one target."""

    target: str
    x_label: str
    y_label: str
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]
    marks: tuple[Mark, ...]
    front: str
    limits: tuple[Limit, ...]


@dataclass(frozen=True, slots=True)
class LayerBar:
    """One layer of the supernet: kept shares between 0 and 1, or None where it is dropped."""

    x: float
    width: float
    heads: float | None
    ffn: float | None
    title: str


def pareto_plots(report: BuildReport) -> list[ParetoPlot]:
    """One plot per target, latency metric, dtype and quality metric that has candidates."""
    groups: dict[tuple[str, str, str, str], list[EntryOutcome]] = {}
    for entry in report.entries:
        if entry.candidates and entry.latency and entry.quality:
            key = (
                entry.target or "-",
                f"{entry.latency.metric} p{entry.latency.percentile}",
                entry.dtype or "",
                entry.quality.metric,
            )
            groups.setdefault(key, []).append(entry)
    return [_pareto(*key, entries) for key, entries in groups.items()]


def _pareto(target: str, metric: str, dtype: str, quality: str, entries: Sequence[EntryOutcome]) -> ParetoPlot:
    points = [(entry, point) for entry in entries for point in entry.candidates]
    limits_ms = [entry.latency.limit_ms for entry in entries if entry.latency and entry.latency.limit_ms]
    x_ticks, x_of = _axis([*(point.latency_ms for _, point in points), *limits_ms], LEFT, WIDTH - RIGHT)
    y_ticks, y_of = _axis([point.quality for _, point in points], HEIGHT - BOTTOM, TOP)
    order = {"over": 0, "fits": 1, "front": 2, "chosen": 3}
    marks = [
        Mark(
            x=x_of(point.latency_ms),
            y=y_of(point.quality),
            kind=_kind(point),
            title=f"{point.shape}: {point.latency_ms:.4g} ms, {quality} {point.quality:.4g}",
            label=entry.name if point.chosen else "",
        )
        for entry, point in points
    ]
    front = sorted({(point.latency_ms, point.quality) for _, point in points if point.on_front})
    return ParetoPlot(
        target=f"{target} {dtype}".strip(),
        x_label=f"predicted {metric}, ms",
        y_label=quality,
        x_ticks=x_ticks,
        y_ticks=y_ticks,
        marks=tuple(sorted(marks, key=lambda mark: order[mark.kind])),
        front=" ".join(f"{x_of(ms):.1f},{y_of(value):.1f}" for ms, value in front),
        limits=tuple(
            Limit(x_of(entry.latency.limit_ms), entry.latency.budget or f"{entry.latency.limit_ms:.4g} ms")
            for entry in entries
            if entry.latency and entry.latency.limit_ms
        ),
    )


def _kind(point: CandidatePoint) -> str:
    return "chosen" if point.chosen else "over" if not point.fits else "front" if point.on_front else "fits"


class _Scale:
    """A straight line from values to pixels."""

    def __init__(self, low: float, high: float, start: float, stop: float) -> None:
        self._low, self._step, self._start = low, (stop - start) / (high - low), start

    def __call__(self, value: float) -> float:
        return self._start + (value - self._low) * self._step


def _axis(values: Iterable[float], start: float, stop: float) -> tuple[tuple[Tick, ...], _Scale]:
    """About four round ticks that enclose `values`, and the scale between them."""
    listed = list(values)
    low, high = min(listed), max(listed)
    span = (high - low) or abs(high) or 1.0
    raw = span / 4
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= raw * 0.999)
    first, last = math.floor(low / step), math.ceil(high / step)
    last = max(last, first + 1)
    scale = _Scale(first * step, last * step, start, stop)
    return tuple(Tick(scale(k * step), f"{k * step:.4g}") for k in range(first, last + 1)), scale


def layer_bars(plan: PlanRecord) -> list[LayerBar]:
    """Every layer of the supernet, in order."""
    kept = {layer.source_layer: layer for layer in plan.layers}
    width = (WIDTH - 2) / plan.num_layers
    bars = []
    for i in range(plan.num_layers):
        x = 1 + i * width
        if (layer := kept.get(i)) is None:
            bars.append(LayerBar(x, width, None, None, f"layer {i}: dropped"))
            continue
        heads, kv_heads = len(layer.query_heads), len(layer.kv_heads)
        bars.append(
            LayerBar(
                x,
                width,
                heads / plan.num_heads,
                layer.ffn / plan.ffn_size,
                f"layer {i}: {heads} of {plan.num_heads} query heads on {kv_heads} of {plan.num_kv_heads} KV heads, "
                f"{layer.ffn} of {plan.ffn_size} neurons",
            )
        )
    return bars


def use_scale(shares: Iterable[float]) -> float:
    """The largest share that the picture of budgets has to show."""
    return max(1.2, *(min(share, 2.0) for share in shares), 0.0) * 1.02
