"""`amoeba.lock`: what was chosen for each entry, from what, and how it was measured. For review and for `--locked`.

TOML, laid out so that a diff reads well: figures one a line, each layer on a line of its own with its counts in
front, so that a reviewer sees "layer 7: 6 heads, 1152 neurons" turn into something else. Kept neurons stand behind
them as a bit mask (base64, neuron 0 first): thousands of indices that nobody reads, in 256 characters.
"""

from __future__ import annotations

import base64
import dataclasses
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from amoeba_export.artifact import FullModelRecord
from amoeba_export.builds.entry import LockedEntry
from amoeba_export.errors import AmoebaError, DamagedFile, InputError, NotLocked
from amoeba_export.ir import InputId, LayerPlan, Policy, Shape, SubnetPlan
from amoeba_export.reading import check_schema, decode, read_toml
from amoeba_export.reading.bounds import MAX_SIZES, shown
from amoeba_export.replacing import replace_text

LOCK_SCHEMA = 1
MAX_BYTES = 64 * 2**20
"""Dozens of entries of a model with 400 billion weights."""

_RANGES = re.compile(r"(?:[0-9]{1,8}(?:-[0-9]{1,8})?(?:,[0-9]{1,8}(?:-[0-9]{1,8})?)*)?")
_HEAD = """\
# Written by 'amoeba build'. Commit it: 'amoeba build --locked' rebuilds exactly this, and refuses changed inputs.
schema_version = 1
"""


def write_lock(path: Path, entries: Sequence[LockedEntry]) -> None:
    """Replace the lock in one step, and only where it changes."""
    text = _HEAD + "".join(map(_entry_text, entries))
    if path.is_file() and path.read_text(encoding="utf-8") == text:
        return
    replace_text(path, text)


def read_lock(path: Path) -> dict[str, LockedEntry]:
    """The entries of a lock by name. Raises `NotLocked`, `DamagedFile`, `InputError`."""
    if not path.is_file():
        raise NotLocked(path)
    restore = "Restore it, or delete it and build."
    data = read_toml(path, what="The lock", next_step=restore, max_bytes=MAX_BYTES)
    again = "Run 'amoeba build' without --locked, and commit the new lock."
    check_schema(data, LOCK_SCHEMA, what="lock", where=path, next_step=again)
    try:
        entries = [_entry(entry) for entry in decode(tuple[_Entry, ...], data.get("entry", ()), "entry")]
    except (ValueError, InputError) as error:
        raise DamagedFile(path, f"it is not a lock ({error})", next_step=restore) from error
    return {entry.name: entry for entry in entries}


def read_lock_or_none(path: Path) -> dict[str, LockedEntry]:
    """The same for a build that may write a new one: what cannot be read counts for nothing."""
    try:
        return read_lock(path)
    except AmoebaError:
        return {}


def _entry_text(entry: LockedEntry) -> str:
    plan = entry.plan
    facts: dict[str, Any] = {
        "name": entry.name,
        "target": entry.target,
        "dtype": entry.dtype,
        "shape": str(plan.shape),
        "policy": plan.policy,
        "compensate": plan.compensate,
        "width_key": plan.width_key,
        "gate_width": plan.gate_width,
        "strategy_id": plan.strategy_id,
        "model_id": plan.model_id,
        "head_tokens": None if plan.head_tokens is None else _ranges(plan.head_tokens),
        "fingerprint": entry.fingerprint,
    }
    lines = ["", "[[entry]]", *(f"{key} = {_value(value)}" for key, value in facts.items() if value is not None)]
    lines += _list("inputs", [_table({"role": i.role, "id": i.id, "sha256": i.sha256}) for i in entry.inputs])
    if entry.reference:
        lines += _list("reference", [_table(dataclasses.asdict(one)) for one in entry.reference])
    lines += _list("layers", [_layer_text(layer) for layer in plan.layers])
    for name, table in (("latency", entry.latency), ("quality", entry.quality), ("files", entry.files)):
        if table is not None:
            lines += [
                "",
                f"[entry.{name}]",
                *(f"{_key(key)} = {_value(v)}" for key, v in table.items() if v is not None),
            ]
    return "\n".join(lines) + "\n"


def _layer_text(layer: LayerPlan) -> str:
    mask = np.zeros(max(layer.ffn, default=-1) + 1, dtype=bool)
    mask[list(layer.ffn)] = True
    return _table(
        {
            "layer": layer.source_layer,
            "heads": _ranges(layer.query_heads),
            "kv": _ranges(layer.kv_heads),
            "neurons": len(layer.ffn),
            "mask": base64.b64encode(np.packbits(mask, bitorder="little").tobytes()).decode("ascii"),
        }
    )


@dataclass(frozen=True)
class _Layer:
    """One layer in the file."""

    layer: int
    heads: str
    kv: str
    neurons: int
    mask: str


@dataclass(frozen=True)
class _Entry:
    """One entry in the file."""

    name: str
    dtype: str
    shape: Shape
    policy: Policy
    compensate: bool
    fingerprint: str
    inputs: tuple[InputId, ...]
    layers: tuple[_Layer, ...]
    target: str | None = None
    width_key: float | None = None
    gate_width: float | None = None
    strategy_id: str | None = None
    model_id: str | None = None
    head_tokens: str | None = None
    latency: Mapping[str, Any] | None = None
    quality: Mapping[str, float] | None = None
    reference: tuple[FullModelRecord, ...] = ()
    files: Mapping[str, str] = field(default_factory=dict)


def _layer(data: _Layer) -> LayerPlan:
    if len(data.mask) > MAX_SIZES["ffn_size"] // 6 + 4:
        raise ValueError(f"layer {data.layer} has a mask of more than {MAX_SIZES['ffn_size']} neurons")
    bits = np.unpackbits(np.frombuffer(base64.b64decode(data.mask, validate=True), dtype=np.uint8), bitorder="little")
    ffn = tuple(np.flatnonzero(bits).tolist())
    if len(ffn) != data.neurons:
        raise ValueError(f"layer {data.layer} lists {len(ffn)} neurons and says {data.neurons}")
    heads, kv_heads = (_indices(text, most=MAX_SIZES["num_heads"]) for text in (data.heads, data.kv))
    return LayerPlan(source_layer=data.layer, query_heads=heads, kv_heads=kv_heads, ffn=ffn)


def _ranges(indices: Sequence[int]) -> str:
    """`0-2,6-8` for (0, 1, 2, 6, 7, 8)."""
    runs: list[list[int]] = []
    for index in indices:
        if runs and runs[-1][-1] == index - 1:
            runs[-1][1:] = [index]
        else:
            runs.append([index])
    return ",".join("-".join(map(str, run)) for run in runs)


def _indices(text: str, *, most: int) -> tuple[int, ...]:
    """The opposite. Raises `ValueError`."""
    if not _RANGES.fullmatch(text):
        raise ValueError(f"{shown(text)} are no indices, such as 0-2,6")
    runs = [[int(end) for end in run.split("-")] for run in text.split(",") if run]
    if sum(run[-1] - run[0] + 1 for run in runs if run[-1] >= run[0]) > most:
        raise ValueError(f"{shown(text)} are more than {most} indices")
    return tuple(index for run in runs for index in range(run[0], run[-1] + 1))


def _entry(data: _Entry) -> LockedEntry:
    tokens = None
    if data.head_tokens is not None:
        tokens = _indices(data.head_tokens, most=MAX_SIZES["vocab_size"])
    nullable = ("budget_ms", "predicted_ms", "measured_ms", "uncertainty")  # TOML has no null: these were left out
    return LockedEntry(
        name=data.name,
        fingerprint=data.fingerprint,
        target=data.target,
        dtype=data.dtype,
        plan=SubnetPlan(
            shape=data.shape,
            policy=data.policy,
            layers=tuple(map(_layer, data.layers)),
            width_key=data.width_key,
            compensate=data.compensate,
            gate_width=data.gate_width,
            strategy_id=data.strategy_id,
            model_id=data.model_id,
            head_tokens=tokens,
        ),
        inputs=data.inputs,
        latency=None if data.latency is None else {**dict.fromkeys(nullable), **data.latency},
        quality=data.quality,
        reference=data.reference,
        files=data.files,
    )


def _list(key: str, items: Sequence[str]) -> list[str]:
    return [f"{key} = [", *(f"  {item}," for item in items), "]"]


def _table(data: Mapping[str, Any]) -> str:
    return "{ " + ", ".join(f"{_key(key)} = {_value(value)}" for key, value in data.items() if value is not None) + " }"


def _key(name: str) -> str:
    return name if name.replace("_", "").replace("-", "").isalnum() and name.isascii() else json.dumps(name)


def _value(value: Any) -> str:
    """A TOML value: JSON's spelling of strings, numbers, lists and truth is TOML's too."""
    if isinstance(value, Mapping):
        return _table(value) if value else "{}"
    return json.dumps(value, allow_nan=False)
