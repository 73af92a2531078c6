"""What can be had, as a table: the frontier first, with bars for latency and quality."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Group, RenderableType
from rich.text import Text

from amoeba_export.cli.console import milliseconds, percent, table
from amoeba_export.ir.frontier import Frontier, FrontierPoint

BAR = 14
"""Columns of a full bar."""

_EIGHTHS = " ▏▎▍▌▋▊▉"


def checked_plots(files: Sequence[Path] | None) -> list[Path]:
    """The files of `--plot`, each of which can be drawn. Asked before the work; raises `BadValue`, `InputError`."""
    from amoeba_export.pictures import check_frontier_file

    return [check_frontier_file(path) for path in files or ()]


def write_plots(frontiers: Sequence[Frontier], files: Sequence[Path]) -> None:
    """The same pictures into every file."""
    from amoeba_export.pictures import write_frontiers

    for path in files:
        write_frontiers(frontiers, path)


def frontier_table(frontier: Frontier, *, numbers: bool = False) -> RenderableType:
    """The distinct choices, the slowest first, and the full models that something beats.

    Args:
        frontier: What was looked at.
        numbers: Say the numbers that `export --pick` takes.
    """
    metric = frontier.quality_metric
    latency = f"{frontier.metric} p{frontier.percentile}"
    figures = (latency, metric, "memory")
    shown = table(*(("",) if numbers else ()), "dtype", "shape", latency, "", metric, "", "memory", "", right=figures)
    rows = [*frontier.numbered, *(one for one in frontier.wholes if one.number is None)]
    most_ms = max((one.latency_ms for one in rows), default=1.0)
    badness = [frontier.badness(one) for one in rows]
    best, worst = min(badness, default=0.0), max(badness, default=0.0)
    for one in sorted(rows, key=lambda one: -one.latency_ms):
        share = (frontier.badness(one) - best) / (worst - best) if worst > best else 0.0
        error = f" ± {percent(one.latency_error)}" if one.latency_error else ""
        spread = f" ± {one.quality_error:.2g}" if one.quality_error else ""
        shown.add_row(
            *((str(one.number or ""),) if numbers else ()),
            one.dtype,
            "full model" if one.is_whole else one.shape,
            f"{milliseconds(one.latency_ms)}{error}",
            bar(one.latency_ms / most_ms),
            f"{one.quality:.4g}{spread}",
            bar(share),
            "-" if one.memory_mb is None else f"{one.memory_mb:.0f} MiB",
            _said(one),
            style="bold" if one.chosen else "" if one.fits and one.number else "dim",
        )
    longer = f"Bars: {latency} from 0, and {metric} from the best to the worst of these."
    return Group(shown, Text(longer, style="dim"))


def bar(share: float) -> str:
    """A bar of `share` of its full length; the least is a hair, so that nothing looks like no figure."""
    eighths = max(1, round(8 * BAR * min(share, 1.0)))
    full, rest = divmod(eighths, 8)
    return "█" * full + (_EIGHTHS[rest] if rest else "")


def _said(one: FrontierPoint) -> str:
    words = ["chosen"] if one.chosen else []
    words += [] if one.fits else ["misses a limit"]
    words += ["measured"] if one.latency_source == "measured" and not one.is_whole else []
    words += [] if one.on_frontier else ["beaten"]
    return ", ".join(words)
