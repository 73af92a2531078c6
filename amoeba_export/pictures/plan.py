"""What a plan keeps, as a heat map: rows are layers of the full model, columns are heads and blocks of neurons."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from amoeba_export.ir import Architecture, LayerPlan, SubnetPlan

WIDTH = 380.0
LEFT, TOP, GAP = 26.0, 18.0, 10.0
MOST_BLOCKS = 24
"""Columns for neurons: each is a share of the FFN's width."""

ROW_HEIGHTS = (5.0, 13.0)
"""Of a row, between a model with many layers and one with few."""

PICTURE_HEIGHT = 330.0
"""What all rows together should take, where that can be."""


@dataclass(frozen=True, slots=True)
class Cell:
    """One head, or one block of neurons, and the share of it that stays."""

    x: float
    width: float
    kind: str
    share: float


@dataclass(frozen=True, slots=True)
class Row:
    """One layer of the full model; `cells` is empty where it is dropped. `label` where its number is written."""

    y: float
    label: str
    title: str
    cells: tuple[Cell, ...]


@dataclass(frozen=True, slots=True)
class PlanPicture:
    """The whole map. `neurons_x` is where the neurons begin, `block` how many are in a column, `units` their name."""

    title: str
    width: float
    height: float
    row_height: float
    rows: tuple[Row, ...]
    heads_x: float
    neurons_x: float
    block: int
    units: str


def plan_picture(plan: SubnetPlan, full: Architecture) -> PlanPicture:
    """The map of `plan`, which is one of `full`."""
    low, high = ROW_HEIGHTS
    row_height = min(high, max(low, PICTURE_HEIGHT / full.num_layers))
    block = -(-full.ffn_size // MOST_BLOCKS)
    num_blocks = -(-full.ffn_size // block)
    room = WIDTH - LEFT - GAP - 2
    unit = room / (full.num_heads + num_blocks)
    neurons_x = LEFT + unit * full.num_heads + GAP
    kept = {layer.source_layer: layer for layer in plan.layers}
    step = 5 if full.num_layers > 12 else 1
    rows = []
    for i in range(full.num_layers):
        cells: list[Cell] = []
        if layer := kept.get(i):
            heads = set(layer.query_heads)
            cells = [Cell(LEFT + unit * j, unit, "heads", float(j in heads)) for j in range(full.num_heads)]
            shares = _shares(layer.ffn, full.ffn_size, block)
            cells += [Cell(neurons_x + unit * j, unit, "neurons", share) for j, share in enumerate(shares)]
        is_labelled = i % step == 0 or i == full.num_layers - 1
        is_labelled = is_labelled and not (i != full.num_layers - 1 and full.num_layers - 1 - i < step // 2)
        rows.append(Row(TOP + row_height * i, str(i) if is_labelled else "", _told(i, layer, full), tuple(cells)))
    return PlanPicture(
        title=f"{plan.shape}: {len(plan.layers)} of {full.num_layers} layers",
        width=WIDTH,
        height=TOP + row_height * full.num_layers + 4,
        row_height=row_height,
        rows=tuple(rows),
        heads_x=LEFT,
        neurons_x=neurons_x,
        block=block,
        units=full.units if full.expert_size else f"FFN {full.units}",
    )


def _shares(neurons: Sequence[int], size: int, block: int) -> list[float]:
    """Kept share of each block of `block` neurons; the last one may be smaller."""
    counts = [0] * -(-size // block)
    for neuron in neurons:
        counts[neuron // block] += 1
    return [count / min(block, size - i * block) for i, count in enumerate(counts)]


def _told(index: int, layer: LayerPlan | None, full: Architecture) -> str:
    if layer is None:
        return f"layer {index}: dropped"
    return (
        f"layer {index}: {len(layer.query_heads)} of {full.num_heads} query heads on {len(layer.kv_heads)} of "
        f"{full.num_kv_heads} KV heads, {len(layer.ffn)} of {full.ffn_size} {full.units}"
    )
