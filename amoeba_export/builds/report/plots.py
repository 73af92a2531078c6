"""Where the marks of the page's pictures go. Coordinates are those of an SVG 380 wide; colours are the page's."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass

from amoeba_export.builds.outcome import BuildReport, EntryOutcome
from amoeba_export.builds.plan_record import PlanRecord
from amoeba_export.ir.frontier import Frontier, merged
from amoeba_export.pictures import NARROW, WIDE, FrontierPicture, frontier_picture

WIDTH = 380.0


@dataclass(frozen=True, slots=True)
class LayerBar:
    """One layer of the supernet: kept shares between 0 and 1, or None where it is dropped."""

    x: float
    width: float
    heads: float | None
    ffn: float | None
    title: str


def frontiers(report: BuildReport) -> list[tuple[Frontier, dict[tuple[str, str], str]]]:
    """What the entries of one model, target, workload and metric were chosen from, as one.

    Each with the names of the entries that took a point, by its precision and shape.
    """
    groups: dict[tuple[object, ...], list[EntryOutcome]] = {}
    for entry in report.entries:
        if (one := entry.frontier) is not None:
            key = (one.model, one.target, one.metric, one.percentile, one.workload, one.quality_metric)
            groups.setdefault(key, []).append(entry)
    found = []
    for entries in groups.values():
        names: dict[tuple[str, str], list[str]] = {}
        for entry in entries:
            if entry.frontier and (chosen := entry.frontier.chosen):
                names.setdefault((chosen.dtype, chosen.shape), []).append(entry.name)
        joined = {key: ", ".join(made) for key, made in names.items()}
        found.append((merged([_named(entry, alone=len(entries) == 1) for entry in entries]), joined))
    return found


def frontier_plots(report: BuildReport) -> list[tuple[Frontier, tuple[FrontierPicture, FrontierPicture]]]:
    """The same as pictures, wide and narrow."""
    plots = []
    for found, names in frontiers(report):
        wide, narrow = (frontier_picture(found, width=w, height=h, names=names) for w, h in (WIDE, NARROW))
        plots.append((found, (wide, narrow)))
    return plots


def _named(entry: EntryOutcome, *, alone: bool) -> Frontier:
    """Its frontier, whose lines say whose they are."""
    assert entry.frontier
    limits = (
        limit if alone else dataclasses.replace(limit, label=f"{entry.name}: {limit.label}")
        for limit in entry.frontier.limits
    )
    return dataclasses.replace(entry.frontier, limits=tuple(limits))


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
                f"{layer.ffn} of {plan.ffn_size} {plan.units}",
            )
        )
    return bars


def use_scale(shares: Iterable[float]) -> float:
    """The largest share that the picture of budgets has to show."""
    return max(1.2, *(min(share, 2.0) for share in shares), 0.0) * 1.02
