"""A cost table that was recorded on the device, replayed where the device is not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path

from amoeba_export.backends import ROUNDS, TIME_LIMIT_S, Availability, Subject
from amoeba_export.backends.targets import Strict, parse_options
from amoeba_export.errors import InputError, TargetError
from amoeba_export.ir import SILENT, Latency, Progress, Source, Target, Workload
from amoeba_export.profile import CostTable, read_table


class Options(Strict):
    """The `[options]` table: `table` is the file that `amoeba profile` wrote."""

    table: Path


source: Source = "recorded"
containers: tuple[str, ...] = ()
options_model = Options


def check(target: Target) -> Availability:
    """Available when the table can be read."""
    try:
        _table(target)
    except InputError as error:
        return Availability(ok=False, reason=error.what, next_step=error.next_step or "Record the table again.")
    return Availability(ok=True)


def describe(target: Target) -> Mapping[str, str]:
    """The device that the table was recorded on."""
    return _table(target).device


def measure(
    subjects: Sequence[Subject],
    workload: Workload,
    *,
    target: Target,
    progress: Progress = SILENT,
    rounds: int = ROUNDS,
    time_limit_s: float = TIME_LIMIT_S,
) -> list[Latency | TargetError]:
    """What the table predicts. Models of other dims or dtypes and unknown workloads are errors of their own."""
    table = _table(target)
    return [_predict(table, subject, workload, target) for subject in subjects]


def _predict(table: CostTable, subject: Subject, workload: Workload, target: Target) -> Latency | TargetError:
    if subject.dtype != table.dtype:
        return TargetError(
            f"The cost table of '{target.name}' was recorded with {table.dtype}, {subject.label} is {subject.dtype}.",
            next_step=f"Export with --dtype {table.dtype}, or record a table with --dtype {subject.dtype}.",
        )
    try:
        return table.latency(subject.dense, workload=workload)
    except InputError as error:
        return TargetError(error.what, where=error.where, next_step=error.next_step)


def _table(target: Target) -> CostTable:
    return _read(parse_options(target).table)


@lru_cache(maxsize=8)
def _read(path: Path) -> CostTable:
    return read_table(path)
