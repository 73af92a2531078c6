"""What any cut of a model costs on a target: measured once and kept, or computed where the target is an estimate."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Sequence

from amoeba_export.artifact import Cache
from amoeba_export.backends import Backend, Subject, find_backend, measure_latency
from amoeba_export.errors import TargetError, TargetUnavailable
from amoeba_export.ir import (
    SILENT,
    Architecture,
    DenseArchitecture,
    Latency,
    Metric,
    Progress,
    SubnetPlan,
    Supernet,
    Target,
    Workload,
)
from amoeba_export.profile import CostTable, pool_rounds, read_table, record_cost_table, refine, write_table
from amoeba_export.search import Predictor

TABLE_NAME = "table.json"

REFINED_NAME = "refined.json"
"""The table with what was measured since."""

SEARCH_GRAPHS = 9
"""Graphs measured for a search that goes on to measure what it builds. `amoeba profile` measures a dozen."""

RUN_ROUNDS = 5
"""Rounds in which an artifact is measured beside the uncut model: the fewest that have an interval."""

MOST_RUNS = 3
"""So many runs of as many rounds, and no more."""

MOST_ROUNDS = MOST_RUNS * RUN_ROUNDS
"""What cannot be told in these is too close to be told."""


class Estimates:
    """The predictor of a backend that computes latencies from dims instead of measuring them."""

    def __init__(self, backend: Backend, target: Target, workload: Workload, dtype: str) -> None:
        self._backend, self._target, self._workload, self._dtype = backend, target, workload, dtype

    def latency(self, dense: DenseArchitecture) -> Latency:
        """The backend's estimate of `dense`. Raises `TargetError`."""
        subject = Subject(dense=dense, dtype=self._dtype)
        (result,) = self._backend.measure([subject], self._workload, target=self._target)
        if isinstance(result, TargetError):
            raise result
        return result

    def predict(self, dense: DenseArchitecture, metric: Metric = "decode", percentile: int = 50) -> tuple[float, float]:
        """See `search.predict.Predictor`."""
        latency = self.latency(dense)
        return latency.of(metric, percentile), latency.uncertainty or 0.0


def is_measured(target: Target) -> bool:
    """Whether the target's latencies are measured, not estimated."""
    return find_backend(target.backend).source == "measured"


def make_predictor(
    supernet: Supernet,
    target: Target,
    workload: Workload,
    dtype: str,
    *,
    cache: Cache,
    min_depth: int | None = None,
    progress: Progress = SILENT,
) -> Predictor:
    """Something that tells the latency of any cut of `supernet` on `target`.

    A target that is measured gets a cost table, taken from the cache when device, versions, dims, dtype and workload
    are the same. Raises `TargetError`.
    """
    backend = find_backend(target.backend)
    if backend.source != "measured":
        return Estimates(backend, target, workload, dtype)
    return make_cost_table(
        supernet,
        target,
        workload,
        dtype,
        cache=cache,
        num_graphs=SEARCH_GRAPHS,
        min_depth=min_depth,
        progress=progress,
    )


def make_cost_table(
    supernet: Supernet,
    target: Target,
    workload: Workload,
    dtype: str,
    *,
    cache: Cache,
    prompt_lengths: Sequence[int] = (),
    num_graphs: int = 12,
    min_depth: int | None = None,
    refresh: bool = False,
    progress: Progress = SILENT,
) -> CostTable:
    """The cost table of `supernet` on `target`, from the cache or measured now (`refresh`: always now)."""
    backend = find_backend(target.backend)
    availability = backend.check(target)
    if not availability.ok:
        raise TargetUnavailable(f"Target '{target.name}' cannot be used: {availability.reason}", availability.next_step)
    facts = _facts(supernet, target, workload, dtype, num_graphs, min_depth, prompt_lengths)
    found = None if refresh else cache.get("cost-tables", facts)
    if found is not None:
        progress.note(f"Cost table of '{target.name}': measured before, taken from the cache.")
        refined = found / REFINED_NAME
        return read_table(refined if refined.is_file() else found / TABLE_NAME)

    def measure(graphs: Sequence[DenseArchitecture], one: Workload) -> Sequence[Latency | TargetError]:
        subjects = [Subject(dense=graph, dtype=dtype, label=_label(graph)) for graph in graphs]
        return measure_latency(subjects, one, target=target, progress=progress)

    table = record_cost_table(
        supernet.architecture,
        measure,
        target=target,
        dtype=dtype,
        workload=workload,
        prompt_lengths=prompt_lengths,
        num_graphs=num_graphs,
        min_depth=min_depth,
        progress=progress,
    )
    cache.put("cost-tables", facts, lambda folder: write_table(table, folder / TABLE_NAME))
    return table


def learn(
    supernet: Supernet,
    target: Target,
    workload: Workload,
    dtype: str,
    measured: Sequence[tuple[DenseArchitecture, Latency, Latency]],
    *,
    cache: Cache,
    min_depth: int | None = None,
) -> None:
    """Refine the cost table of a search by what was built and measured after it: the next search starts closer.

    Args:
        supernet: What was cut.
        target: Where it was measured.
        workload: What it did.
        dtype: Precision of the artifacts.
        measured: Each subnet with the latency of the uncut model in the run that measured it, and its own. It enters
            the table as if it had been measured with it: in proportion to the uncut model.
        cache: Where the table is. Without one, there is nothing to refine.
        min_depth: As the search had it.
    """
    found = cache.get("cost-tables", _facts(supernet, target, workload, dtype, SEARCH_GRAPHS, min_depth, ()))
    if found is None:
        return
    refined = found / REFINED_NAME
    table = read_table(refined if refined.is_file() else found / TABLE_NAME)
    uncut = table.latency(full_dims(supernet.architecture))
    for dense, full, latency in measured:
        table = refine(table, dense, latency.as_when(full, uncut))
    part = found / f"{REFINED_NAME}.{os.getpid()}"
    write_table(table, part)
    part.replace(refined)


def measure_beside_full(
    architecture: Architecture,
    subject: Subject,
    target: Target,
    workload: Workload,
    *,
    enough: Callable[[Latency, Latency], bool] = lambda full, latency: True,
    progress: Progress = SILENT,
) -> tuple[Latency, Latency]:
    """Latency of the uncut model and of `subject`, in turns in one run: their ratio holds when the machine drifts.

    Args:
        architecture: Of the uncut model.
        subject: What is measured beside it.
        target: Where.
        workload: What both do.
        enough: Whether these figures will do. If not, more rounds are added, up to `MOST_RUNS` times as many.
        progress: Is told about it.

    Raises:
        TargetError: One of them could not be measured.
    """
    full = Subject(dense=full_dims(architecture), dtype=subject.dtype, label="the full model")
    runs: list[list[Latency]] = []
    while True:
        results = measure_latency([full, subject], workload, target=target, progress=progress, rounds=RUN_ROUNDS)
        for result in results:
            if isinstance(result, TargetError):
                raise result
        runs.append([result for result in results if isinstance(result, Latency)])
        full_latency, latency = pool_rounds(runs)
        paired = len(full_latency.rounds) == len(latency.rounds) > 0  # a plug-in may keep none
        if len(runs) == MOST_RUNS or not paired or enough(full_latency, latency):
            return full_latency, latency
        progress.note(f"Too close to call after {len(latency.rounds)} rounds: measuring more.")


def full_dims(architecture: Architecture) -> DenseArchitecture:
    """The uncut model."""
    return SubnetPlan.full(architecture).dense(architecture)


def _facts(
    supernet: Supernet,
    target: Target,
    workload: Workload,
    dtype: str,
    num_graphs: int,
    min_depth: int | None,
    prompt_lengths: Sequence[int],
) -> dict[str, object]:
    """What a cost table depends on: it is looked up by this."""
    return {
        "target": dataclasses.asdict(target),
        "device": dict(find_backend(target.backend).describe(target)),
        "architecture": _dims(supernet),
        "workload": dataclasses.asdict(workload),
        "dtype": dtype,
        "num_graphs": num_graphs,
        "min_depth": min_depth,
        "prompt_lengths": list(prompt_lengths),
    }


def _dims(supernet: Supernet) -> dict[str, object]:
    dims = dataclasses.asdict(supernet.architecture)
    del dims["config"]
    return dims


def _label(dense: DenseArchitecture) -> str:
    return f"a graph of {len(dense.layers)} layers, {dense.num_params / 1e6:.1f} M weights"
