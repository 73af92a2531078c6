"""Candidates and shapes spread over a Ray cluster; scores are those of one machine, bit for bit.

Each worker opens the model by the name it is given: a folder has to be at the same path on every node, a hub id or
`demo` is found in each node's own cache. Weights do not travel; that they are the same is checked by their digest.
Samples travel through the object store. Every score comes back to the driver, which keeps the ledger, so an interrupted
run goes on as it would on one machine.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import torch

from amoeba_export import leftovers
from amoeba_export.calibrate.evaluator import KeptLayers, LocalScorer, Widths
from amoeba_export.errors import AmoebaError, TargetError, TargetUnavailable
from amoeba_export.ir import Supernet
from amoeba_export.ir.metric import ObjectiveName
from amoeba_export.model.layers import LayerStack
from amoeba_export.model.samples import Samples
from amoeba_export.model.states import StateStore
from amoeba_export.ray_cluster import joined

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


@dataclass(frozen=True, slots=True, kw_only=True)
class Scoring:
    """What a worker needs beside the model. `states_bytes` is what stored states may take; None stores none."""

    samples: Samples
    objective: ObjectiveName
    states_bytes: int | None = None
    widths: Widths | None = None


class RayFleet:
    """A context: workers that each hold the model, one per `torch.get_num_threads()` processors of a node.

    A worker whose node dies is started elsewhere, and its share is scored again.

    Args:
        open_model: Opens the supernet on a node; has to pickle.
        address: Of the cluster; None for the one that `RAY_ADDRESS` names, else one of this machine alone.

    Raises:
        TargetError: Ray is not installed, the cluster cannot be joined, or has no room for a worker.
    """

    def __init__(self, open_model: Callable[[], Supernet], *, address: str | None = None) -> None:
        self._open_model = open_model
        self._address = address
        self._workers: list[Any] = []
        self._cluster = contextlib.ExitStack()

    def __enter__(self) -> Self:
        self._cluster.enter_context(joined(self._address))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        import ray

        for worker in self._workers:
            ray.kill(worker)
        self._workers = []
        self._cluster.close()

    def start(self, identity: str, *, memory_bytes: int) -> int:
        """Start the workers, and check that all hold the model called `identity`. Returns how many there are."""
        import ray

        threads = torch.get_num_threads()
        nodes = [int(node["Resources"].get("CPU", 0)) for node in ray.nodes() if node["Alive"]]
        count = sum(processors // threads for processors in nodes)
        if count == 0:
            raise TargetUnavailable(
                f"no node of the Ray cluster has {threads} processors",
                "Run with fewer threads: OMP_NUM_THREADS=1.",
            )
        # The same number of threads as here: how sums are split decides their last bit.
        options = {"num_cpus": threads, "max_restarts": -1, "max_task_retries": -1}
        worker = ray.remote(_Worker)
        self._workers = [
            worker.options(**options).remote(self._open_model, memory_bytes, threads) for _ in range(count)
        ]
        for found, problem in ray.get([one.identity.remote() for one in self._workers]):
            if found != identity:
                raise TargetError(
                    f"A worker cannot use the model: {problem or 'it found other weights than there are here'}.",
                    next_step="Put the model at the same path on every node, or name it by its hub id.",
                )
        return count

    def scorer(self, scoring: Scoring) -> RayScorer:
        """A `Scorer` over all workers."""
        return RayScorer(self._workers, scoring)


class RayScorer:
    """See `evaluator.Scorer`. Neighbours among the cuts stay together, since they share most."""

    def __init__(self, workers: Sequence[Any], scoring: Scoring) -> None:
        import ray

        self._workers = workers
        self._scoring = ray.put(scoring)

    def scores(self, cuts: Sequence[KeptLayers], batches: range) -> list[NDArray[np.float64]]:
        """See `Scorer`."""
        import ray

        count = min(len(self._workers), len(cuts))
        ends = [len(cuts) * i // count for i in range(count + 1)]
        shares = [list(cuts[start:stop]) for start, stop in itertools.pairwise(ends)]
        key = self._scoring.hex()
        running = [
            worker.scores.remote(key, self._scoring, share, batches)
            for worker, share in zip(self._workers, shares, strict=False)
        ]
        try:
            return [scores for share in ray.get(running) for scores in share]
        except ray.exceptions.RayTaskError:
            raise
        except ray.exceptions.RayError as error:
            raise TargetError(
                f"The Ray cluster lost its workers: {str(error).splitlines()[0]}",
                next_step="Look at 'ray status', and run the same command again: it goes on where it stopped.",
            ) from error


class _Worker:
    """One process on one node. Opens the model when it is first used, so that a restarted one does so too."""

    def __init__(self, open_model: Callable[[], Supernet], memory_bytes: int, threads: int) -> None:
        torch.set_num_threads(threads)
        self._open_model = open_model
        self._memory_bytes = memory_bytes
        self._opened: LayerStack | None = None
        self._scorers: dict[str, LocalScorer] = {}
        # Never left: this process is killed when the fleet has done its work, and the folder goes with it.
        self._until_killed = contextlib.ExitStack()
        self._folder = self._until_killed.enter_context(leftovers.temporary_folder())

    def identity(self) -> tuple[str, str]:
        """The model's, or why it cannot be opened."""
        try:
            return self._open_model().identity, ""
        except AmoebaError as error:
            return "", error.what.rstrip(".")

    def scores(
        self, key: str, scoring: Scoring, cuts: Sequence[KeptLayers], batches: range
    ) -> list[NDArray[np.float64]]:
        """Scores of a share of the cuts."""
        if self._opened is None:
            self._opened = LayerStack(self._open_model(), memory_bytes=self._memory_bytes)
        if key not in self._scorers:
            states = None
            if scoring.states_bytes is not None:
                folder = self._folder / key
                states = StateStore(self._opened, scoring.samples, folder, limit_bytes=scoring.states_bytes)
            self._scorers[key] = LocalScorer(
                self._opened, scoring.samples, scoring.objective, states=states, widths=scoring.widths
            )
        return self._scorers[key].scores(cuts, batches)
