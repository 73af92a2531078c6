"""Profile a target: choose graphs, measure them in interleaved rounds, fit, and doubt what does not fit."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from amoeba_export.errors import TargetError
from amoeba_export.ir import SILENT, Architecture, DenseArchitecture, Latency, Progress, Target, Workload
from amoeba_export.profile.cost_table import CostTable, fit_cost_table
from amoeba_export.profile.design import design_graphs
from amoeba_export.profile.rounds import measure_interleaved

Measure = Callable[[DenseArchitecture, Workload], Latency]
"""Opens a graph with these dims (weights are random), measures one workload, closes it. Raises `TargetError`."""


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
    rounds: int = 3,
    progress: Progress = SILENT,
) -> CostTable:
    """Measure at most `num_graphs` graphs of `architecture` on `target` and fit a cost table.

    Graphs that the device cannot run are left out, with a warning. Measurements that the others contradict are taken
    once more, and the second one counts.

    Args:
        architecture: The supernet.
        measure: How one graph is measured.
        target: Its `align` holds for the graphs, too.
        dtype: Precision of the graphs.
        workload: What is measured; also the table's default.
        prompt_lengths: Further prompt lengths, measured on every graph. With at least one, the table can tell the
            latency at any length.
        num_graphs: Upper limit of different graphs.
        min_depth: Fewest layers of a graph; the search's shallowest.
        rounds: Measurements of each graph.
        progress: Who listens.

    Raises:
        TargetError: Too few graphs could be measured.
    """
    graphs = design_graphs(architecture, num_graphs=num_graphs, min_depth=min_depth, align=target.align)
    lengths = dict.fromkeys((workload.prompt_tokens, *prompt_lengths))
    workloads = [
        Workload(prompt_tokens=length, generate_tokens=workload.generate_tokens, batch=workload.batch)
        for length in lengths
    ]
    subjects = [(graph, one) for one in workloads for graph in graphs]
    result = measure_interleaved(
        subjects,
        lambda subject: measure(*subject),
        rounds=rounds,
        description=f"Profiling {target.name}",
        progress=progress,
    )
    measured = [
        (graph, latency) for (graph, _), latency in zip(subjects, result.latencies, strict=True) if latency is not None
    ]
    if not measured:
        raise next(iter(result.errors.values()))
    table = _fit(measured, target, dtype)
    for position in table.suspects:
        graph, first = measured[position]
        progress.note(f"Measurement {position + 1} of {len(measured)} does not fit the others; measuring it again.")
        try:
            measured[position] = (graph, measure(graph, first.workload))
        except TargetError as error:
            progress.warn(f"Measuring it again failed, the first measurement stays: {error.what}")
    return _fit(measured, target, dtype) if table.suspects else table


def _fit(measured: Sequence[tuple[DenseArchitecture, Latency]], target: Target, dtype: str) -> CostTable:
    return fit_cost_table(measured, target=target.name, dtype=dtype)
