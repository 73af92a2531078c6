"""How many threads a target is fastest with: decode is bound by memory, and two threads may beat four."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from amoeba_export.backends import Subject, find_backend, measure_latency
from amoeba_export.backends.targets import with_threads
from amoeba_export.errors import TargetError
from amoeba_export.ir import SILENT, DenseArchitecture, Latency, Progress, Target, Workload
from amoeba_export.quantities import milliseconds

ROUNDS = 3
"""In which each number is measured."""

TIE = 0.02
"""Fewer threads that are slower by no more than this share are taken: other work has the cores."""


@dataclass(frozen=True, slots=True)
class Tried:
    """A number of threads, and the time of the full model with it."""

    threads: int
    latency_ms: float


def sweep_threads(
    target: Target, dense: DenseArchitecture, workload: Workload, *, dtype: str, progress: Progress = SILENT
) -> Target:
    """`target` with the number of threads that runs `dense` fastest, by the target's metric.

    Raises:
        UsageError: Its backend has no threads to choose.
        TargetError: It cannot be measured, or does not say how many cores it has.
    """
    with_threads(target, 1)
    tried = []
    for threads in _numbers(_cores(target)):
        subject = Subject(dense=dense, dtype=dtype, label=f"{threads} threads")
        found = with_threads(target, threads)
        (result,) = measure_latency([subject], workload, target=found, progress=progress, rounds=ROUNDS)
        if not isinstance(result, Latency):
            raise result
        tried.append(Tried(threads, result.of(target.metric)))
        progress.note(f"{_of(threads)}: {target.metric} of the full model takes {milliseconds(tried[-1].latency_ms)}.")
    best = choose(tried)
    progress.note(f"{target.name} is measured with {_of(best)}. To keep this, add to its file: threads = {best}")
    return with_threads(target, best)


def choose(tried: Sequence[Tried]) -> int:
    """The fewest threads that are as fast as any."""
    least_ms = min(one.latency_ms for one in tried)
    return min(one.threads for one in tried if one.latency_ms <= least_ms * (1 + TIE))


def _cores(target: Target) -> int:
    """What the target says of itself."""
    said = find_backend(target.backend).describe(target).get("cores", "")
    if not (said.isascii() and said.isdecimal() and int(said) > 0):
        raise TargetError(
            f"The target '{target.name}' does not report its number of cores"
            + (f" (it reports '{said}')" if said else "")
            + ", so a sweep has no numbers of threads to try.",
            next_step="Give the number yourself: --threads N.",
        )
    return int(said)


def _numbers(cores: int) -> list[int]:
    """Powers of two, and all cores."""
    return sorted({2**power for power in range(cores.bit_length()) if 2**power < cores} | {cores})


def _of(threads: int) -> str:
    return f"{threads} thread{'s' if threads > 1 else ''}"
