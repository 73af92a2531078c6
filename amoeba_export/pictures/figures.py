"""Pictures as files, by matplotlib: PNG, SVG, PDF. The same bytes for the same data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from amoeba_export.errors import BadValue, InputError
from amoeba_export.ir.frontier import Frontier, FrontierPoint
from amoeba_export.pictures.frontier import LabelPlace, label_place, visible
from amoeba_export.quantities import percent
from amoeba_export.replacing import replacing

SUFFIXES = (".png", ".svg", ".pdf")
COLOURS = ("#0b62c4", "#b35900", "#13795b", "#7a3fb0", "#a3285a", "#5c6370")
"""Of precisions, as on pages in the light."""

GREY, LIMIT = "#aab3bd", "#c4222b"


@dataclass(frozen=True, slots=True, kw_only=True)
class Ratio:
    """A time over that of a baseline. `low` and `high` are the ends of its interval, None where there is none."""

    name: str
    ratio: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class SizedPoint:
    """A model's size and quality."""

    name: str
    millions: float
    quality: float
    on_front: bool


def check_picture(path: Path, more: Sequence[str] = ()) -> Path:
    """`path`. Asked before the work.

    Raises:
        BadValue: Its suffix is that of nothing that can be drawn.
        InputError: matplotlib is needed, and is not installed.
    """
    suffix = path.suffix.lower()
    if suffix not in (*SUFFIXES, *more):
        raise BadValue("--plot", str(path), f"a file that ends in {', '.join((*SUFFIXES, *more))}")
    if suffix in SUFFIXES:
        _matplotlib()
    return path


def draw_frontiers(frontiers: Sequence[Frontier], path: Path) -> None:
    """Latency against quality, one below the other. Raises as `check_picture`."""
    figure = _figure(8.0, 5.2 * len(frontiers))
    for axes, frontier in zip(figure.subplots(len(frontiers), squeeze=False)[:, 0], frontiers, strict=True):
        _draw_frontier(axes, frontier)
    _save(figure, path)


def draw_ratios(ratios: Sequence[Ratio], path: Path, *, what: str, margin: float | None = None) -> None:
    """Times over that of the first, the baseline. Raises as `check_picture`.

    Args:
        ratios: The baseline first.
        path: The file.
        what: Which time, such as `decode`.
        margin: The share by which one may be slower.
    """
    drawn = list(ratios)[::-1]
    figure = _figure(7.0, 1.4 + 0.5 * len(drawn))
    axes = figure.subplots()
    for height, one in enumerate(drawn):
        ends = None if one.low is None or one.high is None else [[one.ratio - one.low], [one.high - one.ratio]]
        axes.errorbar(one.ratio, height, xerr=ends, fmt="o", capsize=4, color=COLOURS[0])
        axes.annotate(f"{one.ratio:.3f}", (one.ratio, height), textcoords="offset points", xytext=(0, 8), ha="center")
    axes.axvline(1.0, color="0.5", linewidth=1)
    if margin is not None:
        axes.axvline(1 + margin, color=LIMIT, linewidth=1, linestyle="--", label=f"{percent(margin)} slower")
        axes.legend()
    axes.set_yticks(range(len(drawn)), [one.name for one in drawn])
    axes.set_ylim(-0.5, len(drawn) - 0.3)
    axes.set_xlabel(f"{what} time over that of {ratios[0].name}, with 90 % interval")
    axes.grid(axis="x", alpha=0.3)
    _save(figure, path)


def draw_sizes(points: Sequence[SizedPoint], path: Path, *, metric: str) -> None:
    """Quality over size, and the front. Raises as `check_picture`."""
    figure = _figure(7.0, 4.5)
    axes = figure.subplots()
    front = sorted((one for one in points if one.on_front), key=lambda one: one.millions)
    for some, style, label in (
        (points, {"linestyle": "none", "alpha": 0.5, "color": GREY}, "shapes"),
        (front, {"color": COLOURS[0]}, "no smaller one is better"),
    ):
        axes.plot([one.millions for one in some], [one.quality for one in some], marker="o", label=label, **style)
    for one in front:
        axes.annotate(one.name, (one.millions, one.quality), textcoords="offset points", xytext=(4, 4), fontsize=7.5)
    if metric == "perplexity":
        axes.set_yscale("log")
    axes.set_xlabel("weights of the dense model, millions")
    axes.set_ylabel(metric)
    axes.grid(alpha=0.3)
    axes.legend()
    _save(figure, path)


def _draw_frontier(axes: Any, frontier: Frontier) -> None:
    colours = {dtype: COLOURS[i % len(COLOURS)] for i, dtype in enumerate(frontier.dtypes)}
    shown = list(visible(frontier))
    grey = [one for one in shown if not one.on_frontier and not one.is_whole]
    axes.plot(*_places(grey), linestyle="none", marker="o", markersize=2.5, color=GREY, alpha=0.7, zorder=1)
    for dtype in frontier.dtypes:
        line = [one for one in frontier.line(dtype) if one in shown]
        axes.plot(*_places(line), color=colours[dtype], linewidth=1.3, alpha=0.6, label=dtype, zorder=2)
        near = [one for one in line if one.on_frontier and one.number is None]
        axes.plot(*_places(near), linestyle="none", marker="o", markersize=2.5, color=colours[dtype], zorder=3)
    for one in frontier.numbered:
        axes.errorbar(
            one.latency_ms,
            one.quality,
            xerr=one.latency_ms * one.latency_error or None,
            yerr=one.quality_error or None,
            color=colours[one.dtype],
            elinewidth=1.1,
            alpha=0.75,
            zorder=3,
        )
    for one in shown:
        if one.is_whole or one.number is not None:
            _draw_mark(axes, one, colours[one.dtype], label_place(frontier, one))
    for limit in frontier.limits:
        if limit.latency_ms is not None:
            axes.axvline(limit.latency_ms, color=LIMIT, linewidth=1.2, linestyle="--", zorder=2)
            style = {"xycoords": axes.get_xaxis_transform(), "xytext": (4, -4), "va": "top"}
            place = (limit.latency_ms, 0.98)
        else:
            assert limit.quality is not None, "one of the two"
            axes.axhline(limit.quality, color=LIMIT, linewidth=1.2, linestyle="--", zorder=2)
            style = {"xycoords": axes.get_yaxis_transform(), "xytext": (0, 4), "va": "bottom"}
            place = (0.01, limit.quality)
        axes.annotate(limit.label, place, textcoords="offset points", color=LIMIT, **style)
    axes.set_xscale("log")
    _plain_ticks(axes.xaxis)
    if frontier.quality_metric == "perplexity":
        axes.set_yscale("log")
        _plain_ticks(axes.yaxis)
    axes.set_title(f"{frontier.model} on {frontier.target}")
    axes.set_xlabel(f"{frontier.metric} p{frontier.percentile}, ms (logarithmic)")
    axes.set_ylabel(f"{frontier.quality_metric}, {'higher' if frontier.higher_is_better else 'lower'} is better")
    axes.grid(alpha=0.25, which="both", linewidth=0.6)
    axes.margins(x=0.09, y=0.1)
    axes.plot([], [], linestyle="none", marker="D", markersize=8, color="0.35", label="the full model")
    axes.plot([], [], linestyle="none", marker="o", markersize=9, color="0.35", label="a choice, with its number")
    axes.plot([], [], linestyle="none", marker="o", markersize=3, color=GREY, label="something is as fast and better")
    # Below the axis: a legend inside covers points or error bars of a full picture.
    axes.legend(fontsize=8.5, loc="upper center", bbox_to_anchor=(0.5, -0.11), ncols=4, frameon=False)


def _draw_mark(axes: Any, point: FrontierPoint, colour: str, label_at: LabelPlace) -> None:
    place = (point.latency_ms, point.quality)
    face, edge = (colour, "white") if point.on_frontier else ("white", GREY)
    marker, size = ("D", 12) if point.is_whole else ("o", 12.5)
    axes.plot(*place, marker=marker, markersize=size, color=face, markeredgecolor=edge, zorder=5)
    if point.number is not None:
        style = {"color": "white", "ha": "center", "va": "center_baseline", "fontsize": 7.5, "fontweight": "bold"}
        axes.annotate(str(point.number), place, zorder=6, **style)
    if point.is_whole:
        offset, ha = {
            "right": ((14 if point.chosen else 10, 0), "left"),
            "above": ((0, 13), "center"),
            "below": ((0, -14), "center"),
        }[label_at]
        beside = {"textcoords": "offset points", "xytext": offset, "ha": ha, "va": "center_baseline"}
        axes.annotate(point.dtype, place, zorder=6, fontsize=9, fontweight="bold", **beside)
    if point.chosen:
        axes.plot(
            *place, marker="o", markersize=20, markerfacecolor="none", markeredgecolor="black", markeredgewidth=1.8
        )


def _places(points: Sequence[FrontierPoint]) -> tuple[list[float], list[float]]:
    return [one.latency_ms for one in points], [one.quality for one in points]


def _plain_ticks(axis: Any) -> None:
    """Round numbers instead of powers of ten."""
    from matplotlib.ticker import LogLocator, NullFormatter, ScalarFormatter

    axis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 4, 5, 7)))
    axis.set_major_formatter(ScalarFormatter())
    axis.set_minor_formatter(NullFormatter())
    axis.set_minor_locator(LogLocator(subs=()))


def _matplotlib() -> tuple[Any, Any]:
    """Its canvas and figure, without the global state of pyplot."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise InputError(
            "The plot needs matplotlib, which is not installed.",
            next_step="Install it with: pip install 'amoeba-export[report]', or leave --plot out.",
        ) from error
    return FigureCanvasAgg, Figure


def _figure(width: float, height: float) -> Any:
    canvas, kind = _matplotlib()
    figure = kind(figsize=(width, height), layout="constrained")
    canvas(figure)
    return figure


def _save(figure: Any, path: Path) -> None:
    """Without the date or version of the program that drew it."""
    import matplotlib

    suffix = path.suffix.lower()
    metadata = {".png": {"Software": None}, ".svg": {"Date": None}, ".pdf": {"CreationDate": None, "Producer": None}}
    with matplotlib.rc_context({"svg.hashsalt": "amoeba"}), replacing(path) as part:
        figure.savefig(part, format=suffix[1:], dpi=140, metadata=metadata[suffix])
