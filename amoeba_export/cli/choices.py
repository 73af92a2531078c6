"""What can be had, as a table: the frontier first, with bars for latency and quality. And what was chosen of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Group, RenderableType
from rich.text import Text

from amoeba_export.cli.console import answer, milliseconds, percent, print_json, table
from amoeba_export.ir import Shape
from amoeba_export.ir.frontier import Frontier, FrontierPoint

if TYPE_CHECKING:
    from amoeba_export.application.pipeline import ExportResult

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


def is_whole(result: ExportResult) -> bool:
    """Whether nothing is cut."""
    return result.plan.shape == Shape(result.supernet.architecture.num_layers, 1.0)


def looked_at(result: ExportResult) -> dict[str, Any]:
    """For programs; nothing where nothing was looked at."""
    return {} if result.frontier is None else {"frontier": result.frontier.to_json()}


def show_choice(result: ExportResult, *, as_json: bool) -> None:
    """What a search, or a dry run, came to."""
    if as_json:
        data: dict[str, Any] = {"model": result.supernet.name, "out": str(result.settings.out)}
        if result.search is not None:
            data |= {"dtype": result.settings.dtype, **result.search.to_json()}
            data["reference"] = [dataclasses.asdict(one) for one in result.reference]
        print_json({**data, "plan": result.plan.to_json(), **looked_at(result)})
        return
    console = answer()
    if result.frontier is not None:
        console.print(frontier_table(result.frontier))
        console.print()
    if result.search is not None:
        budget, limit_ms = result.search.limits[0]
        best = result.search.best
        console.print(
            f"{_name(result)} is the best under {milliseconds(limit_ms)} ({budget.metric} p{budget.percentile}): "
            f"{milliseconds(best.predicted_ms)} predicted, ± {percent(best.uncertainty)}."
        )
    elif result.frontier is not None and (point := result.frontier.chosen) is not None:
        how = "is the fastest that is good enough" if result.settings.quality else f"is number {point.number}"
        console.print(
            f"{_name(result)} {how}: {milliseconds(point.latency_ms)}, "
            f"{result.frontier.quality_metric} {point.quality:.4g}."
        )
    else:
        layers = " ".join(map(str, result.plan.kept_layers))
        console.print(f"{result.plan.shape} keeps the layers {layers}.")


def _name(result: ExportResult) -> str:
    """How the choice is called: its precision is said where there was a choice of one."""
    shape = str(result.plan.shape)
    if len(result.settings.target.dtypes if result.settings.target else ()) < 2:
        return shape
    return f"{'The whole model' if is_whole(result) else shape} in {result.settings.dtype}"
