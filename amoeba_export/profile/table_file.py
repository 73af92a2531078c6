"""Cost tables as JSON: written once where the device is, replayed anywhere to the last bit."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict
from itertools import groupby
from pathlib import Path
from typing import Any

from amoeba_export.errors import DamagedFile, InputError, NotFound
from amoeba_export.ir import Architecture, Timing, Workload
from amoeba_export.profile.cost_table import PERCENTILES, PHASES, CostTable, Measurement
from amoeba_export.profile.features import Counts, dims_of
from amoeba_export.profile.fit import Fit

TABLE_SCHEMA = 1


def cost_key(
    architecture: Architecture, *, target: str, dtype: str, workload: Workload, device: Mapping[str, str]
) -> str:
    """sha256 of all that a cost table depends on: dims, precision, workload, and the device as its backend tells it."""
    content = {
        "schema_version": TABLE_SCHEMA,
        "target": target,
        "dtype": dtype,
        "dims": dims_of(architecture),
        "workload": asdict(workload),
        "device": dict(device),
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def table_to_json(table: CostTable) -> dict[str, Any]:
    """The content of a cost table file. Every float survives the way through text."""
    return {
        "schema_version": TABLE_SCHEMA,
        "target": table.target,
        "dtype": table.dtype,
        "source": table.source,
        "workload": asdict(table.workload),
        "device": dict(table.device),
        "dims": dict(table.dims),
        "measurements": [
            {
                "prompt_tokens": item.prompt_tokens,
                "layers": [[*counts, len(list(run))] for counts, run in groupby(item.layers)],
                "decode": asdict(item.decode),
                "prefill": asdict(item.prefill),
            }
            for item in table.measurements
        ],
        "fits": {name: asdict(fit) for name, fit in table.fits.items()},
    }


def table_from_json(data: Mapping[str, Any], *, where: str | Path = "cost table") -> CostTable:
    """Read what `table_to_json` made. Raises `InputError` or `DamagedFile`."""
    try:
        version = data["schema_version"]
        if version != TABLE_SCHEMA:
            raise InputError(
                f"This cost table has schema version {version}; this amoeba reads {TABLE_SCHEMA}.",
                where=where,
                next_step="Profile the target again with 'amoeba profile'.",
            )
        table = CostTable(
            target=data["target"],
            dtype=data["dtype"],
            dims={name: int(size) for name, size in data["dims"].items()},
            workload=Workload(**data["workload"]),
            source=data["source"],
            measurements=tuple(_measurement(item) for item in data["measurements"]),
            fits={name: _fit(fit) for name, fit in data["fits"].items()},
            device=dict(data["device"]),
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DamagedFile(where, f"{type(error).__name__}: {error}") from error
    needed = [f"{phase}_p{percentile}" for phase in PHASES for percentile in PERCENTILES]
    if missing := [name for name in needed if name not in table.fits]:
        raise DamagedFile(where, f"it lacks the fits {', '.join(missing)}")
    return table


def write_table(table: CostTable, path: Path) -> None:
    """Write `table` as JSON."""
    path.write_text(json.dumps(table_to_json(table), indent=1) + "\n", encoding="utf-8")


def read_table(path: Path) -> CostTable:
    """Read a cost table file. Raises `NotFound`, `DamagedFile` or `InputError`."""
    if not path.is_file():
        raise NotFound(
            "The cost table", path, next_step="Record one with 'amoeba profile MODEL --target T --out table.json'."
        )
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DamagedFile(path, str(error)) from error
    if not isinstance(data, dict):
        raise DamagedFile(path, "it holds no JSON object")
    return table_from_json(data, where=path)


def _measurement(item: Mapping[str, Any]) -> Measurement:
    layers: list[Counts] = []
    for num_heads, num_kv_heads, ffn_size, repeat in item["layers"]:
        layers.extend([Counts(int(num_heads), int(num_kv_heads), int(ffn_size))] * int(repeat))
    return Measurement(
        layers=tuple(layers),
        prompt_tokens=int(item["prompt_tokens"]),
        decode=Timing(**item["decode"]),
        prefill=Timing(**item["prefill"]),
    )


def _fit(data: Mapping[str, Any]) -> Fit:
    fit = Fit(
        columns=tuple(data["columns"]),
        coefficients_ms=tuple(map(float, data["coefficients_ms"])),
        sigma=float(data["sigma"]),
        inverse_gram=tuple(tuple(map(float, line)) for line in data["inverse_gram"]),
        spare_rows=int(data["spare_rows"]),
        leave_one_out=tuple(map(float, data["leave_one_out"])),
        studentized=tuple(map(float, data["studentized"])),
    )
    size = len(fit.columns)
    if len(fit.coefficients_ms) != size or [len(line) for line in fit.inverse_gram] != [size] * size:
        raise ValueError(f"{size} columns with {len(fit.coefficients_ms)} coefficients")
    return fit
