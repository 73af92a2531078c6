"""A cost table as one call: measure on the target what any cut of the model costs there, and write it down."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from amoeba_export.application.costs import is_measured, make_cost_table
from amoeba_export.application.threads import sweep_threads
from amoeba_export.artifact import check_file_destination
from amoeba_export.backends.targets import read_target, with_threads
from amoeba_export.cache import Cache
from amoeba_export.errors import EstimateRefused
from amoeba_export.ir import SILENT, Progress, Target, Workload
from amoeba_export.load import load_supernet
from amoeba_export.profile import CostTable, Profiling, write_table


def profile(
    target: str | Target,
    model: str = "demo",
    *,
    out: Path,
    dtype: str | None = None,
    workload: Workload | None = None,
    threads: int | Literal["sweep"] | None = None,
    progress: Progress = SILENT,
) -> CostTable:
    """Record a cost table of `target`, to replay where it is not.

    Graphs that span the space of subnets are measured, and an additive model is fitted to them. They have the model's
    dims and random weights: no checkpoint travels, and speed does not depend on values.

    Args:
        target: The name of one, its TOML file, or what `read_target` and `over_ssh` give.
        model: A model folder, a hub id, or `demo`.
        out: The file (JSON). Replaced when it exists.
        dtype: Precision of the weights; None for what the target's file says.
        workload: Tokens of the prompt and to generate, and sequences at once; None for 128, 128 and 1.
        threads: Of the CPU; `sweep` for the number that runs the full model fastest, None for what the target's file
            says.
        progress: Told what is being measured.

    Returns:
        The table: milliseconds of each part of a layer.

    Raises:
        UsageError: `out` is a folder, the target's latency is an estimate, or it has no threads to choose.
        InputError: The target's file or the model cannot be read.
        TargetError: The target cannot be measured.
    """
    check_file_destination(out)
    found = target if isinstance(target, Target) else read_target(target)
    if not is_measured(found):
        raise EstimateRefused(found.name, found.backend)
    supernet = load_supernet(model, progress=progress)
    workload, dtype = workload or Workload(), dtype or found.dtype
    if threads == "sweep":
        found = sweep_threads(found, supernet.architecture.uncut, workload, dtype=dtype, progress=progress)
    elif threads is not None:
        found = with_threads(found, threads)
    profiling = Profiling(target=found, workload=workload, dtype=dtype)
    costs = make_cost_table(supernet, profiling, cache=Cache(), refresh=True, progress=progress)
    out.parent.mkdir(parents=True, exist_ok=True)
    write_table(costs, out)
    return costs
