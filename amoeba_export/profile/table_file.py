"""Cost tables as JSON: written once where the device is, replayed anywhere to the last bit."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from amoeba_export.errors import DamagedFile
from amoeba_export.ir import Architecture, Source, Timing, Workload
from amoeba_export.profile.cost_table import PERCENTILES, PHASES, CostTable, Measurement
from amoeba_export.profile.features import BEYOND, Counts, dims_of, features
from amoeba_export.profile.fit import Fit
from amoeba_export.reading import check_schema, decode, dim_problems, read_json_object
from amoeba_export.reading.bounds import MAX_SIZES, shown
from amoeba_export.replacing import replace_text

TABLE_SCHEMA = 2
"""Since 2, a fit may have a knee. Tables of version 1 have none."""
SHORTEST_MS, LONGEST_MS = 1e-9, 1e12
"""What a time can be: from less than one instruction takes to 30 years."""
MAX_KNEE = 1e9
"""Millions of weights."""


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
                "layers": [[*_shown(counts), len(list(run))] for counts, run in groupby(item.layers)],
                "decode": asdict(item.decode),
                "prefill": asdict(item.prefill),
            }
            for item in table.measurements
        ],
        "fits": {name: asdict(fit) for name, fit in table.fits.items()},
    }


def table_from_json(data: Mapping[str, Any], *, where: str | Path = "cost table") -> CostTable:
    """Read what `table_to_json` made. Raises `InputError` or `DamagedFile`."""
    again = "Profile the target again with 'amoeba profile'."
    check_schema(data, TABLE_SCHEMA, since=1, what="cost table", where=where, next_step=again)
    try:
        dims = decode(dict[str, int], data.get("dims"), "dims")
        table = CostTable(
            target=decode(str, data.get("target"), "target"),
            dtype=decode(str, data.get("dtype"), "dtype"),
            dims=dims,
            workload=decode(Workload, data.get("workload"), "workload"),
            source=decode(Source, data.get("source"), "source"),  # type: ignore[arg-type] # a Literal
            measurements=_measurements(data.get("measurements"), dims),
            fits=decode(dict[str, Fit], data.get("fits"), "fits"),
            device=decode(dict[str, str], data.get("device"), "device"),
        )
        problems = _problems(table)
    except ValueError as error:
        raise DamagedFile(where, f"it is not a cost table ({error})", next_step=again) from error
    if problems:
        raise DamagedFile(where, f"its figures make no sense: {'; '.join(problems[:6])}", next_step=again)
    return table


def write_table(table: CostTable, path: Path) -> None:
    """Write `table` as JSON, at once or not at all."""
    replace_text(path, json.dumps(table_to_json(table), indent=1) + "\n")


def read_table(path: Path) -> CostTable:
    """Read a cost table file. Raises `NotFound`, `DamagedFile` or `InputError`."""
    missing = "Record one with 'amoeba profile MODEL --target T --out table.json'."
    return table_from_json(read_json_object(path, what="The cost table", missing=missing), where=path)


@dataclass(frozen=True)
class _Row:
    """One of `measurements` in the file.

    Each of `layers` is heads, KV heads, neurons, the window where there is one, and how often in a row.
    """

    prompt_tokens: int
    layers: tuple[tuple[int, ...], ...]
    decode: Timing
    prefill: Timing


def _shown(counts: Counts) -> tuple[int, ...]:
    """Without a window, as files had it before there were windows."""
    return tuple(counts) if counts.window else tuple(counts)[:-1]


def _measurements(data: Any, dims: Mapping[str, int]) -> tuple[Measurement, ...]:
    needed = ("num_layers", "num_heads", "num_kv_heads", "ffn_size")
    problems = [f"dims has no '{name}'" for name in needed if name not in dims] or dim_problems(dims, needed)
    if dims.get("experts_per_token", 1) < 1:
        problems.append(f"experts_per_token is {shown(dims['experts_per_token'])}")
    if problems:
        raise ValueError("; ".join(problems))
    made = []
    for i, row in enumerate(decode(tuple[_Row, ...], data, "measurements")):
        if any(len(run) not in (4, 5) for run in row.layers):
            raise ValueError(f"measurements[{i}] has a layer that is not heads, KV heads, neurons and how often")
        # Counted before they are laid out: a repeat may be any number.
        if any(repeat < 1 for *_, repeat in row.layers) or sum(run[-1] for run in row.layers) > dims["num_layers"]:
            raise ValueError(f"measurements[{i}] has more layers than its model, or less than none")
        for *counts, _ in row.layers:
            most = (*(dims[name] for name in needed[1:]), MAX_SIZES["sliding_window"])
            if any(not 0 <= count <= limit for count, limit in zip(counts, most, strict=False)):
                raise ValueError(f"measurements[{i}] has a layer of {counts}, which is no cut of its model")
        layers = tuple(Counts(*counts) for *counts, repeat in row.layers for _ in range(repeat))
        made.append(Measurement(layers=layers, prompt_tokens=row.prompt_tokens, decode=row.decode, prefill=row.prefill))
    return tuple(made)


def _problems(table: CostTable) -> list[str]:
    """What no measurement and no fit to measurements can be."""
    needed = [f"{phase}_p{percentile}" for phase in PHASES for percentile in PERCENTILES]
    problems = [f"it lacks the fit {name}" for name in needed if name not in table.fits]
    if not table.measurements:
        problems.append("it has no measurements")
    problems += [
        f"workload.{name} is {value}"
        for name, value in asdict(table.workload).items()
        if not 1 <= value <= MAX_SIZES["max_positions"]
    ]
    for i, item in enumerate(table.measurements):
        place = f"measurements[{i}]"
        if not 1 <= item.prompt_tokens <= MAX_SIZES["max_positions"]:
            problems.append(f"{place}.prompt_tokens is {item.prompt_tokens}")
        for phase in PHASES:
            times = [item.milliseconds(phase, percentile) for percentile in PERCENTILES]
            if not all(SHORTEST_MS <= time <= LONGEST_MS for time in times):
                problems.append(f"{place}.{phase} takes {times} ms")
            if not 0 <= item.noise(phase) <= LONGEST_MS:
                problems.append(f"{place}.{phase} has a noise of {item.noise(phase)}")
    for name, fit in table.fits.items():
        problems += [f"{name}: {problem}" for problem in _fit_problems(fit, table, name)]
    return problems


def _fit_problems(fit: Fit, table: CostTable, name: str) -> list[str]:
    size, num_measurements, problems = len(fit.columns), len(table.measurements), []
    known = [phase for phase in PHASES if name.startswith(f"{phase}_")]
    terms = features((), table.dims, known[0], 1) if known else {}
    if fit.knee is not None and known == ["decode"]:
        terms[BEYOND] = 0.0
    if unknown := [column for column in fit.columns if column not in terms] if known else []:
        problems.append(f"there is no column {shown(unknown[0])}")
    if len(set(fit.columns)) < size or len(fit.coefficients_ms) != size:
        problems.append(f"{size} columns with {len(fit.coefficients_ms)} coefficients")
    if [len(line) for line in fit.inverse_gram] != [size] * size:
        problems.append(f"{size} columns with another inverse_gram")
    if not all(0 <= cost <= LONGEST_MS for cost in fit.coefficients_ms):
        problems.append("a cost is negative or too large")
    elif not any(fit.coefficients_ms):
        problems.append("all its costs are zero")
    if fit.knee is not None and not 0 <= fit.knee <= MAX_KNEE:
        problems.append(f"its knee is at {fit.knee}")
    elif (fit.knee is None) != (BEYOND not in fit.columns):
        problems.append(f"a knee without the term '{BEYOND}', or the term without a knee")
    if not 0 <= fit.sigma <= LONGEST_MS:
        problems.append(f"sigma is {fit.sigma}")
    if not 1 <= fit.spare_rows <= num_measurements:
        problems.append(f"spare_rows is {fit.spare_rows}")
    if not len(fit.leave_one_out) == len(fit.studentized) == num_measurements:
        problems.append("its errors are not one a measurement")
    return problems
