"""The picture of `docs/targets.md`: estimated against published times, for a light page and a dark one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from amoeba_export.replacing import replacing

BAND = 0.15
"""Of the published time: where decode has to lie."""

FLOWS = {
    "edgellm": ("TensorRT Edge-LLM", "o"),
    "tensorrt-fp16": ("TensorRT, fp16", "s"),
    "vllm": ("vLLM", "^"),
    "mlc": ("MLC", "D"),
    "llamacpp": ("llama.cpp", "v"),
}
"""Name and mark of each flow."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ground:
    """The colours of a page, and of the flows on it in the order of `FLOWS`."""

    page: str
    ink: str
    line: str
    flows: tuple[str, ...]


GROUNDS = {
    "light": Ground(
        page="#ffffff", ink="#1b1f24", line="#8a939d", flows=("#0b62c4", "#13795b", "#b35900", "#7a3fb0", "#a3285a")
    ),
    "dark": Ground(
        page="#1e2129", ink="#e6e8eb", line="#8a939d", flows=("#6cb0ff", "#5cc8a1", "#f0a050", "#c59af0", "#f08ab4")
    ),
}


def draw(rows: Sequence[Mapping[str, Any]], folder: Path) -> list[Path]:
    """`analytic-light.png` and `analytic-dark.png`, one mark for each of the rows of `benchmarks.analytic`.

    A row is drawn as what the fit without it says, its `error`, so that no mark lies on the line because it was fitted.
    """
    paths = []
    for name, ground in GROUNDS.items():
        path = folder / f"analytic-{name}.png"
        figure = _figure(rows, ground)
        with replacing(path) as part:
            figure.savefig(part, format="png", dpi=140, metadata={"Software": None})
        paths.append(path)
    return paths


def _figure(rows: Sequence[Mapping[str, Any]], ground: Ground) -> Figure:
    colours = dict.fromkeys(("text.color", "axes.labelcolor", "xtick.color", "ytick.color"), ground.ink)
    with matplotlib.rc_context({**colours, "axes.edgecolor": ground.line, "axes.facecolor": ground.page}):
        figure = Figure(figsize=(7.2, 5.6), layout="constrained", facecolor=ground.page)
        FigureCanvasAgg(figure)
        _draw(figure.subplots(), rows, ground)
    return figure


def _draw(axes: Any, rows: Sequence[Mapping[str, Any]], ground: Ground) -> None:
    times = [row["published_ms"] for row in rows]
    ends = [min(times) / 1.4, max(times) * 1.4]
    axes.fill_between(
        ends,
        [end * (1 - BAND) for end in ends],
        [end * (1 + BAND) for end in ends],
        color=ground.line,
        alpha=0.22,
        linewidth=0,
        label=f"within {100 * BAND:g} %",
    )
    axes.plot(ends, ends, color=ground.line, linewidth=1)
    for (flow, (name, mark)), colour in zip(FLOWS.items(), ground.flows, strict=True):
        for metric, face in (("decode", colour), ("prefill", "none")):
            own = [row for row in rows if (row["flow"], row["metric"]) == (flow, metric)]
            if not own:
                continue
            axes.plot(
                [row["published_ms"] for row in own],
                [row["published_ms"] * (1 + row["error"]) for row in own],
                linestyle="none",
                marker=mark,
                markersize=7,
                markerfacecolor=face,
                markeredgecolor=colour,
                markeredgewidth=1.4,
                label=f"{name}, {metric}",
            )
    axes.set_xscale("log")
    axes.set_yscale("log")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(LogLocator(subs=(1, 3)))
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.set_minor_formatter(NullFormatter())
    axes.set_xlim(*ends)
    axes.set_ylim(*ends)
    axes.set_xlabel("published, ms")
    axes.set_ylabel("estimated without that run, ms")
    axes.grid(alpha=0.25, linewidth=0.6, color=ground.line)
    axes.legend(fontsize=9, facecolor=ground.page, edgecolor=ground.line)
