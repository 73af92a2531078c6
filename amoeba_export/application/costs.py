"""What any cut of a model costs on a target: measured once and kept, or computed where the target is an estimate."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from amoeba_export.application.recipes import deepened
from amoeba_export.application.session import Session
from amoeba_export.artifact import sha256_file
from amoeba_export.backends import Backend, Subject, find_backend, measure_latency
from amoeba_export.cache import Cache
from amoeba_export.cache.kinds import COST_TABLES, REFINED_TABLES
from amoeba_export.errors import NotFound, TargetError, TargetUnavailable
from amoeba_export.ir import (
    SILENT,
    DenseArchitecture,
    Latency,
    Metric,
    Progress,
    Supernet,
    Target,
    Workload,
)
from amoeba_export.profile import CostTable, Profiling, pool_rounds, read_table, record_cost_table, refine, write_table
from amoeba_export.search import Predictor

TABLE_NAME = "table.json"

SEARCH_GRAPHS = 9
"""Graphs measured for a search that goes on to measure what it builds. `amoeba profile` measures a dozen."""

LOOKS = (3, 5, 10, 15)
"""Rounds of an artifact beside the uncut model after which they are looked at: more are measured if they do not decide.
Three are enough for what is far from a budget. Five are the fewest that have an interval."""

MOST_ROUNDS = LOOKS[-1]
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


def table_facts(supernet: Supernet, profiling: Profiling) -> dict[str, object]:
    """Everything that a table depends on: it is looked up by this."""
    return {
        **device_facts(supernet, profiling.target, profiling.workload),
        "dtype": profiling.dtype,
        "num_graphs": profiling.num_graphs,
        "min_depth": profiling.min_depth,
        "prompt_lengths": list(profiling.prompt_lengths),
    }


def device_facts(supernet: Supernet, target: Target, workload: Workload) -> dict[str, object]:
    """What a latency depends on besides what is measured."""
    return {
        "target": dataclasses.asdict(target),
        "device": dict(find_backend(target.backend).describe(target)),
        "architecture": _dims(supernet),
        "workload": dataclasses.asdict(workload),
    }


def profiling_of(session: Session) -> Profiling:
    """What a search of `session` needs a table of."""
    recipe, strategy = session.settings.recipe, session.supernet.strategy
    min_depth = strategy.min_depth if strategy else None
    if recipe is not None:  # an automatic calibration may be deepened later, and the table is to serve it too
        num_layers = session.architecture.num_layers
        min_depth = num_layers - deepened(recipe, num_layers).depth.removed_of(num_layers)
    return Profiling(
        target=session.target,
        workload=session.settings.workload,
        dtype=session.dtype,
        num_graphs=SEARCH_GRAPHS,
        min_depth=min_depth,
    )


def make_predictor(session: Session) -> Predictor:
    """Something that tells the latency of any cut of the supernet on the target, in the session's dtype.

    A target that is measured gets a cost table, taken from the cache when device, versions, dims, dtype and workload
    are the same. Raises `TargetError`.
    """
    backend = session.backend
    if backend.source != "measured":
        return Estimates(backend, session.target, session.settings.workload, session.dtype)
    return make_cost_table(session.supernet, profiling_of(session), cache=session.cache, progress=session.progress)


def make_cost_table(
    supernet: Supernet, profiling: Profiling, *, cache: Cache, refresh: bool = False, progress: Progress = SILENT
) -> CostTable:
    """The cost table, from the cache or measured now (`refresh`: always now)."""
    target, dtype = profiling.target, profiling.dtype
    availability = find_backend(target.backend).check(target)
    if not availability.ok:
        raise TargetUnavailable(f"Target '{target.name}' cannot be used: {availability.reason}", availability.next_step)
    facts = table_facts(supernet, profiling)
    found = None if refresh else cache.get(COST_TABLES, facts, progress=progress)
    if found is not None:
        progress.note(f"Cost table of '{target.name}': measured before, taken from the cache.")
        return _newest(cache, facts, found, progress)

    def measure(graphs: Sequence[DenseArchitecture], one: Workload) -> Sequence[Latency | TargetError]:
        subjects = [Subject(dense=graph, dtype=dtype, label=_label(graph)) for graph in graphs]
        return measure_latency(subjects, one, target=target, progress=progress)

    table = record_cost_table(supernet.architecture, measure, profiling, progress=progress)
    cache.put(COST_TABLES, facts, lambda folder: write_table(table, folder / TABLE_NAME), again=refresh)
    return table


def learn(session: Session, measured: Sequence[tuple[DenseArchitecture, Latency, Latency]]) -> None:
    """Refine the cost table of a search by what was built and measured after it: the next search starts closer.

    Args:
        session: As the search had it. Without a table in its cache, there is nothing to refine.
        measured: Each subnet with the latency of the uncut model in the run that measured it, and its own. It enters
            the table as if it had been measured with it: in proportion to the uncut model.
    """
    cache, facts = session.cache, table_facts(session.supernet, profiling_of(session))
    found = cache.get(COST_TABLES, facts, progress=session.progress)
    if found is None:
        return
    table = _newest(cache, facts, found, session.progress)
    uncut = table.latency(session.full)
    for dense, full, latency in measured:
        table = refine(table, dense, latency.as_when(full, uncut))
    refined = _refined_facts(facts, found)
    cache.put(REFINED_TABLES, refined, lambda folder: write_table(table, folder / TABLE_NAME), again=True)


def _refined_facts(facts: Mapping[str, object], entry: Path) -> dict[str, object]:
    """What a refined table is looked up by: it is of one table, not of whatever is measured next."""
    return {**facts, "table": sha256_file(entry / TABLE_NAME)}


def _newest(cache: Cache, facts: Mapping[str, object], entry: Path, progress: Progress) -> CostTable:
    """The table of a cache entry, with what was measured since."""
    refined = cache.get(REFINED_TABLES, _refined_facts(facts, entry), progress=progress)
    if refined is not None:
        with suppress(NotFound):  # another process puts a newer one there at this moment
            return read_table(refined / TABLE_NAME)
    return read_table(entry / TABLE_NAME)


def measure_beside_full(
    session: Session,
    subject: Subject,
    *,
    full_dtype: str | None = None,
    enough: Callable[[Latency, Latency], bool] = lambda full, latency: True,
) -> tuple[Latency, Latency]:
    """Latency of the uncut model and of `subject`, in turns in one run: their ratio holds when the machine drifts.

    Args:
        session: Of which model, where, and what both do.
        subject: What is measured beside it.
        full_dtype: Precision of the uncut model; None means that of `subject`.
        enough: Whether these figures will do. Asked after each of `LOOKS`; if not, more rounds are added.

    Raises:
        TargetError: One of them could not be measured.
    """
    full = Subject(dense=session.full, dtype=full_dtype or subject.dtype, label="the full model")
    runs: list[list[Latency]] = []
    for num_before, num_rounds in itertools.pairwise((0, *LOOKS)):
        results = measure_latency(
            [full, subject],
            session.settings.workload,
            target=session.target,
            progress=session.progress,
            rounds=num_rounds - num_before,
        )
        runs.append(_all_measured(results))
        full_latency, latency = pool_rounds(runs)
        paired = len(full_latency.rounds) == len(latency.rounds) > 0  # a plug-in may keep none
        if num_rounds == MOST_ROUNDS or not paired or enough(full_latency, latency):
            break
        if num_rounds > LOOKS[0]:
            session.progress.note(f"Too close to call after {len(latency.rounds)} rounds: measuring more.")
    return full_latency, latency


def _all_measured(results: Sequence[Latency | TargetError]) -> list[Latency]:
    """`results`, none of which may be an error."""
    latencies = []
    for result in results:
        if isinstance(result, TargetError):
            raise result
        latencies.append(result)
    return latencies


def _dims(supernet: Supernet) -> dict[str, object]:
    return supernet.architecture.facts()


def _label(dense: DenseArchitecture) -> str:
    return f"a graph of {len(dense.layers)} layers, {dense.num_params / 1e6:.1f} M weights"
