"""RoPE as values of a graph: the tables that layers of each kind turn queries and keys by."""

from __future__ import annotations

from dataclasses import dataclass

from amoeba_export.formats.onnx.datatype import DataType
from amoeba_export.formats.onnx.graph import Recorder, Value
from amoeba_export.formats.onnx.rope import distinct_ropes, rope_table
from amoeba_export.formats.onnx.weights import WeightStore
from amoeba_export.ir import DenseArchitecture, Rope


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """One RoPE in a graph.

    Attributes:
        name: Of the tables, empty where a model has one RoPE.
        cos: The table [rows, R / 2]; `sin` alike.
        num_short: See `RopeTable`.
    """

    name: str
    rope: Rope
    cos: Value
    sin: Value
    num_short: int


def turned_by(dense: DenseArchitecture) -> dict[str, Rope]:
    """Every RoPE that a layer of `dense` has; the only one of a model in any case."""
    named = distinct_ropes(dense.base.layer_kinds)
    used = [dense.kind(layer).rope for layer in dense.layers]
    return {name: rope for name, rope in named.items() if len(named) == 1 or rope in used}


def store_turns(dense: DenseArchitecture, store: WeightStore) -> list[Turn]:
    """Store the tables that the layers of `dense` need."""
    dtype = store.precision.activation
    turns = []
    for name, rope in turned_by(dense).items():
        table = rope_table(rope, dense.base.max_positions)
        label = f"rope.{name}" if name else "rope"
        cos = store.table(f"{label}.cos", table.cos, dtype)
        sin = store.table(f"{label}.sin", table.sin, dtype)
        turns.append(Turn(name=name, rope=rope, cos=cos, sin=sin, num_short=table.num_short))
    return turns


def table_rows(positions: Value, turn: Turn, longest: Value | None, recorder: Recorder) -> Value:
    """The rows of a table for `positions`, which are in a text of `longest` tokens."""
    if not turn.num_short:
        return positions
    assert longest is not None
    op, constant = recorder.op, recorder.constant
    node = f"/rope/{turn.name}" if turn.name else "/rope"
    short = constant(f"{node}/num_short", turn.num_short)
    is_long = op("Greater", [longest, short], name=f"{node}/is_long")
    offset = op(
        "Mul", [op("Cast", [is_long], name=f"{node}/long", to=int(DataType.INT64)), short], name=f"{node}/first"
    )
    return op("Add", [positions, offset], name=f"{node}/rows")
