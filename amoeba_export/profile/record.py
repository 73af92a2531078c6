"""Profile a target: choose graphs, measure them in interleaved rounds, fit, and doubt what does not fit."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from amoeba_export.errors import TargetError
from amoeba_export.ir import SILENT, Architecture, DenseArchitecture, Latency, Progress, Target, Workload
from amoeba_export.profile.cost_table import CostTable, fit_cost_table
from amoeba_export.profile.design import design_graphs, graphs_between
from amoeba_export.profile.knee import is_bent

Measure = Callable[[Sequence[DenseArchitecture], Workload], Sequence[Latency | TargetError]]
"""Measures graphs of these dims (weights are random) in interleaved rounds: one result per graph, in order."""

LOUD = 0.05
"""Median scatter between rounds above which a table deserves a warning."""

BETWEEN = 3
"""Graphs that are added where time bends with size: that many tell where its knee is."""

MOST_SUSPECTS = 0.34
"""Share of the graphs that are measured again at most."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Profiling:
    """What a cost table is of, besides a model.

    Attributes:
        target: Its `align` holds for the graphs, too.
        dtype: Precision of the graphs.
        workload: What is measured; also the table's default.
        prompt_lengths: Further prompt lengths, measured on every graph. With at least one, the table can tell the
            latency at any length.
        num_graphs: Upper limit of different graphs.
        min_depth: Fewest layers of a graph; the search's shallowest. None for what is usual.
    """

    target: Target
    dtype: str
    workload: Workload
    prompt_lengths: tuple[int, ...] = ()
    num_graphs: int = 12
    min_depth: int | None = None


def record_cost_table(
    architecture: Architecture, measure: Measure, profiling: Profiling, *, progress: Progress = SILENT
) -> CostTable:
    """Measure graphs of `architecture` as `profiling` says and fit a cost table.

    Graphs that the device cannot run are left out. Measurements that scatter, or that the others contradict, are taken
    once more, and the second one counts. Where the time to decode bends with size, `BETWEEN` more graphs tell where.

    Args:
        architecture: The supernet.
        measure: How graphs are measured: all of a workload at once, so that they share rounds.
        profiling: On which target, in which precision, and how many.
        progress: Who listens.

    Raises:
        TargetError: Too few graphs could be measured.
    """
    target, workload, min_depth = profiling.target, profiling.workload, profiling.min_depth
    graphs = design_graphs(architecture, num_graphs=profiling.num_graphs, min_depth=min_depth, align=target.align)
    lengths = dict.fromkeys((workload.prompt_tokens, *profiling.prompt_lengths))
    measured: list[tuple[DenseArchitecture, Latency]] = []
    failed: list[TargetError] = []

    def add(graphs: Sequence[DenseArchitecture]) -> None:
        for length in lengths:
            results = measure(graphs, dataclasses.replace(workload, prompt_tokens=length))
            for graph, result in zip(graphs, results, strict=True):
                if isinstance(result, TargetError):
                    failed.append(result)
                else:
                    measured.append((graph, result))

    add(graphs)
    if not measured:
        raise failed[0]
    table = _fit(measured, profiling)
    # Many suspects at once are a loud machine, not odd graphs: measuring them again would be as loud.
    if 0 < len(table.suspects) <= len(measured) * MOST_SUSPECTS:
        _measure_again(measured, table.suspects, measure, progress)
        table = _fit(measured, profiling)
    if table.noise <= LOUD and is_bent(table.fits["decode_p50"]):
        between = graphs_between(architecture, graphs, num_graphs=BETWEEN, min_depth=min_depth, align=target.align)
        if between:
            progress.note(
                f"On '{target.name}', the decode time is not a sum of its parts: measuring {len(between)} more graphs."
            )
            add(between)
            table = _fit(measured, profiling)
    if table.noise > LOUD:
        progress.warn(
            f"'{target.name}' is not quiet: its measurements scatter by {100 * table.noise:.0f} %. "
            "Close other programs and profile it again for a better cost table."
        )
    return table


def _measure_again(
    measured: list[tuple[DenseArchitecture, Latency]],
    suspects: Sequence[int],
    measure: Measure,
    progress: Progress,
) -> None:
    """Put second measurements of `suspects` in place of the first, those of one workload in one go."""
    progress.note(f"Measuring {len(suspects)} of {len(measured)} graphs again: they scatter, or do not fit the others.")
    for workload in dict.fromkeys(measured[i][1].workload for i in suspects):
        positions = [i for i in suspects if measured[i][1].workload == workload]
        for i, again in zip(positions, measure([measured[i][0] for i in positions], workload), strict=True):
            if isinstance(again, TargetError):
                progress.warn(f"The second measurement of a graph failed, so the first one counts: {again.what}")
            else:
                measured[i] = (measured[i][0], again)


def _fit(measured: Sequence[tuple[DenseArchitecture, Latency]], profiling: Profiling) -> CostTable:
    return fit_cost_table(measured, target=profiling.target.name, dtype=profiling.dtype)
