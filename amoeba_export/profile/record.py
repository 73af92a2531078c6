"""Profile a target: choose graphs, measure them in interleaved rounds, fit, and doubt what does not fit."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

from amoeba_export.errors import TargetError
from amoeba_export.ir import SILENT, Architecture, DenseArchitecture, Latency, Progress, Target, Workload
from amoeba_export.profile.cost_table import CostTable, fit_cost_table
from amoeba_export.profile.design import design_graphs

Measure = Callable[[Sequence[DenseArchitecture], Workload], Sequence[Latency | TargetError]]
"""Measures graphs of these dims (weights are random) in interleaved rounds: one result per graph, in order."""


def record_cost_table(
    architecture: Architecture,
    measure: Measure,
    *,
    target: Target,
    dtype: str,
    workload: Workload,
    prompt_lengths: Sequence[int] = (),
    num_graphs: int = 12,
    min_depth: int | None = None,
    progress: Progress = SILENT,
) -> CostTable:
    """Measure at most `num_graphs` graphs of `architecture` on `target` and fit a cost table.

    Graphs that the device cannot run are left out, with a warning. Measurements that the others contradict are taken
    once more, and the second one counts.

    Args:
        architecture: The supernet.
        measure: How graphs are measured: all of a workload at once, so that they share rounds.
        target: Its `align` holds for the graphs, too.
        dtype: Precision of the graphs.
        workload: What is measured; also the table's default.
        prompt_lengths: Further prompt lengths, measured on every graph. With at least one, the table can tell the
            latency at any length.
        num_graphs: Upper limit of different graphs.
        min_depth: Fewest layers of a graph; the search's shallowest.
        progress: Who listens.

    Raises:
        TargetError: Too few graphs could be measured.
    """
    graphs = design_graphs(architecture, num_graphs=num_graphs, min_depth=min_depth, align=target.align)
    lengths = dict.fromkeys((workload.prompt_tokens, *prompt_lengths))
    measured: list[tuple[DenseArchitecture, Latency]] = []
    failed: list[TargetError] = []
    for length in lengths:
        results = measure(graphs, dataclasses.replace(workload, prompt_tokens=length))
        for graph, result in zip(graphs, results, strict=True):
            if isinstance(result, TargetError):
                failed.append(result)
            else:
                measured.append((graph, result))
    if not measured:
        raise failed[0]
    table = _fit(measured, target, dtype)
    for position in table.suspects:
        graph, first = measured[position]
        progress.note(f"Measurement {position + 1} of {len(measured)} does not fit the others; measuring it again.")
        (again,) = measure([graph], first.workload)
        if isinstance(again, TargetError):
            progress.warn(f"Measuring it again failed, the first measurement stays: {again.what}")
        else:
            measured[position] = (graph, again)
    return _fit(measured, target, dtype) if table.suspects else table


def _fit(measured: Sequence[tuple[DenseArchitecture, Latency]], target: Target, dtype: str) -> CostTable:
    return fit_cost_table(measured, target=target.name, dtype=dtype)
