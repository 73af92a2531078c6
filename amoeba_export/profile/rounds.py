"""Rounds of measuring several models in turns: what a round has in common, and more rounds of the same models."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from amoeba_export.ir import Latency, Timing

FloatArray = NDArray[np.float64]


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


def scatter_of(times: Sequence[float]) -> float | None:
    """Median relative distance of the rounds' times from their median; None with fewer than two."""
    if len(times) < 2:
        return None
    return float(np.median(np.abs(np.array(times) / np.median(times) - 1)))


def pool_rounds(runs: Sequence[Sequence[Latency]]) -> list[Latency]:
    """The same models measured in several runs, as if it had been one run with all their rounds.

    A p90 is the new p50 times the median of the runs' p90 / p50.

    Args:
        runs: For each run the latency of every model, with its rounds.
    """
    if len(runs) == 1:
        return list(runs[0])
    models = list(zip(*runs, strict=True))
    rounds = [tuple(one for latency in model for one in latency.rounds) for model in models]
    polished = [median_polish(np.array([[one[phase] for one in own] for own in rounds]))[0] for phase in (0, 1)]
    pooled = []
    for i, model in enumerate(models):
        decode = _pooled([one.decode for one in model], float(polished[0][i]), [one[0] for one in rounds[i]])
        prefill = _pooled([one.prefill for one in model], float(polished[1][i]), [one[1] for one in rounds[i]])
        memory = [one.memory_mb for one in model if one.memory_mb is not None]
        pooled.append(
            dataclasses.replace(
                model[-1], decode=decode, prefill=prefill, memory_mb=max(memory, default=None), rounds=rounds[i]
            )
        )
    return pooled


def _pooled(timings: Sequence[Timing], p50_ms: float, rounds_ms: Sequence[float]) -> Timing:
    tail = float(np.median([one.p90_ms / one.p50_ms for one in timings]))
    num_samples = sum(one.num_samples for one in timings)
    return Timing(p50_ms=p50_ms, p90_ms=p50_ms * tail, num_samples=num_samples, noise=scatter_of(rounds_ms))
