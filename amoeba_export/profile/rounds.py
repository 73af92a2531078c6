"""What several interleaved rounds of measuring have in common, so that a slow minute can be taken out."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

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
