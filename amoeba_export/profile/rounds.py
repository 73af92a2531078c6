"""Interleaved measuring: every subject once per round, so that a slow minute hits all of them and can be taken out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from amoeba_export.errors import TargetError
from amoeba_export.ir import SILENT, Latency, Progress, Timing

FloatArray = NDArray[np.float64]
T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Interleaved:
    """What several rounds say of each subject.

    Attributes:
        latencies: One per subject, in order, from the rounds before it failed, if it did; None without any.
        errors: Why, by position, of each subject that failed.
    """

    latencies: tuple[Latency | None, ...]
    errors: dict[int, TargetError]


def measure_interleaved(
    subjects: Sequence[T],
    measure: Callable[[T], Latency],
    *,
    rounds: int = 3,
    description: str = "Measuring",
    progress: Progress = SILENT,
) -> Interleaved:
    """Measure all `subjects` in `rounds` rounds; odd rounds run backwards, so that a trend does not favour the first.

    A subject is open only while it is measured (`measure` opens and closes it): several open sessions would spin
    against each other. Its value is the median over the rounds, each round first divided by what it has in common
    (median polish, Tukey 1977): a machine that is 10 % slower during one round moves nothing.

    A subject with a `TargetError` (a crash, a time limit, no memory) is not tried again, and the others go on;
    `KeyboardInterrupt` and everything else end the measuring.
    """
    results: list[list[Latency | None]] = [[None] * rounds for _ in subjects]
    errors: dict[int, TargetError] = {}
    with progress.track(description, rounds * len(subjects)) as advance:
        for round_idx in range(rounds):
            order = range(len(subjects)) if round_idx % 2 == 0 else reversed(range(len(subjects)))
            for i in order:
                if i in errors:
                    advance(1)
                    continue
                try:
                    results[i][round_idx] = measure(subjects[i])
                except TargetError as error:
                    errors[i] = error
                    progress.warn(f"Subject {i + 1} of {len(subjects)} failed: {error.what}")
                advance(1)
    return _combine(results, errors)


def _combine(results: Sequence[Sequence[Latency | None]], errors: dict[int, TargetError]) -> Interleaved:
    timings = {
        phase: _polished([[getattr(one, phase) if one else None for one in row] for row in results])
        for phase in ("decode", "prefill")
    }
    latencies: list[Latency | None] = []
    for i, row in enumerate(results):
        alive = [one for one in row if one is not None]
        decode, prefill = timings["decode"][i], timings["prefill"][i]
        if decode is None or prefill is None:
            latencies.append(None)
            continue
        memory = [one.memory_mb for one in alive if one.memory_mb is not None]
        latencies.append(replace(alive[0], decode=decode, prefill=prefill, memory_mb=max(memory) if memory else None))
    return Interleaved(latencies=tuple(latencies), errors=errors)


def _polished(rows: Sequence[Sequence[Timing | None]]) -> list[Timing | None]:
    """One timing per row of rounds: the polished median, above it the median tail of the rounds, and their scatter."""
    times = np.array([[one.p50_ms if one else np.nan for one in row] for row in rows], dtype=np.float64)
    polished, scatter = median_polish(times)
    timings: list[Timing | None] = []
    for row, p50_ms, noise in zip(rows, polished.tolist(), scatter.tolist(), strict=True):
        alive = [one for one in row if one is not None]
        if not alive:
            timings.append(None)
            continue
        tail = float(np.median([one.p90_ms / one.p50_ms for one in alive]))
        num_samples = sum(one.num_samples for one in alive)
        timings.append(
            Timing(
                p50_ms=p50_ms,
                p90_ms=p50_ms * tail,
                num_samples=num_samples,
                noise=noise if len(alive) > 1 else alive[0].noise,
            )
        )
    return timings


def median_polish(times: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Split times [subjects, rounds] into subject times and round factors; NaN marks a missing one.

    Returns:
        The time of each subject [subjects], the median round factor being 1, and the median relative deviation of its
        single times from it, the factors taken out [subjects]. NaN where a subject has no time.
    """
    subjects, scatter = np.full(len(times), np.nan), np.full(len(times), np.nan)
    alive = ~np.isnan(times).all(axis=1)
    if not alive.any():
        return subjects, scatter
    logs = np.log(times[alive])
    factors = np.zeros(times.shape[1])
    for _ in range(10):
        rest = logs - np.nanmedian(logs - factors, axis=1)[:, None]
        seen = ~np.isnan(rest).all(axis=0)
        factors[seen] = np.nanmedian(rest[:, seen], axis=0)
        factors -= np.median(factors[seen])
    values = np.nanmedian(logs - factors, axis=1)
    subjects[alive] = np.exp(values)
    scatter[alive] = np.nanmedian(np.abs(logs - values[:, None] - factors), axis=1)
    return subjects, scatter
