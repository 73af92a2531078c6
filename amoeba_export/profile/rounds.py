"""Interleaved measuring: every subject once per round, so that a slow minute hits all of them and can be taken out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from amoeba_export.errors import TargetError
from amoeba_export.ir import SILENT, Latency, Progress, Timing

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Interleaved:
    """What several rounds say of each subject.

    Attributes:
        latencies: One per subject, in order; None where measuring failed in every round.
        errors: Why, by position, of each subject that failed in some round (the last error).
        noise: Median relative deviation of a single measurement from its subject's value, after the rounds' common
            factors are removed; 0 for a single round.
    """

    latencies: tuple[Latency | None, ...]
    errors: dict[int, TargetError]
    noise: float


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

    One subject's `TargetError` (a crash, a time limit, no memory) is kept and the others go on; `KeyboardInterrupt` and
    everything else end the measuring.
    """
    results: list[list[Latency | None]] = [[None] * rounds for _ in subjects]
    errors: dict[int, TargetError] = {}
    with progress.track(description, rounds * len(subjects)) as advance:
        for round_idx in range(rounds):
            order = range(len(subjects)) if round_idx % 2 == 0 else reversed(range(len(subjects)))
            for i in order:
                try:
                    results[i][round_idx] = measure(subjects[i])
                except TargetError as error:
                    errors[i] = error
                    progress.warn(f"Subject {i + 1} of {len(subjects)} failed: {error.what}")
                advance(1)
    return _combine(results, errors)


def _combine(results: Sequence[Sequence[Latency | None]], errors: dict[int, TargetError]) -> Interleaved:
    polished = {}
    noises = []
    for phase in ("decode", "prefill"):
        times = np.array(
            [[_p50(getattr(one, phase)) if one is not None else np.nan for one in row] for row in results],
            dtype=np.float64,
        )
        polished[phase], noise = median_polish(times)
        noises.append(noise)
    latencies: list[Latency | None] = []
    for i, row in enumerate(results):
        alive = [one for one in row if one is not None]
        if not alive:
            latencies.append(None)
            continue
        first = alive[0]
        latencies.append(
            Latency(
                decode=_timing([one.decode for one in alive], float(polished["decode"][i])),
                prefill=_timing([one.prefill for one in alive], float(polished["prefill"][i])),
                source=first.source,
                workload=first.workload,
                device=first.device,
                uncertainty=first.uncertainty,
            )
        )
    return Interleaved(latencies=tuple(latencies), errors=errors, noise=max(noises))


def _p50(timing: Timing) -> float:
    return timing.p50_ms


def _timing(timings: Sequence[Timing], p50_ms: float) -> Timing:
    """The polished median, and above it the median tail of the rounds."""
    tail = float(np.median([timing.p90_ms / timing.p50_ms for timing in timings]))
    return Timing(p50_ms=p50_ms, p90_ms=p50_ms * tail, num_samples=sum(timing.num_samples for timing in timings))


def median_polish(times: NDArray[np.float64]) -> tuple[NDArray[np.float64], float]:
    """Split times [subjects, rounds] into subject times and round factors; NaN marks a missing one.

    Returns:
        The time of each subject [subjects], the median round factor being 1, and the median relative deviation of one
        time from subject times factor.
    """
    if times.shape[1] == 1:
        return times[:, 0].copy(), 0.0
    alive = ~np.isnan(times).all(axis=1)
    subjects = np.full(len(times), np.nan)
    if not alive.any():
        return subjects, 0.0
    logs = np.log(times[alive])
    factors = np.zeros(times.shape[1])
    for _ in range(10):
        values = np.nanmedian(logs - factors, axis=1)
        rest = logs - values[:, None]
        seen = ~np.isnan(rest).all(axis=0)
        factors[seen] = np.nanmedian(rest[:, seen], axis=0)
        factors -= np.median(factors[seen])
    values = np.nanmedian(logs - factors, axis=1)
    subjects[alive] = np.exp(values)
    deviations = np.abs(logs - values[:, None] - factors)
    return subjects, float(np.nanmedian(deviations))
