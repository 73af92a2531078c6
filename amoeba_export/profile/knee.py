"""The knee of a decode time: above some size, weights no longer fit the cache, and each of them costs more.

A sum of terms cannot bend. One more term can: the weights above the knee. Its cost is never negative, so the time is
the larger one of two sums, below the knee and above it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise

import numpy as np

from amoeba_export.profile.features import BEYOND
from amoeba_export.profile.fit import (
    MIN_SPARE_ROWS,
    Fit,
    FloatArray,
    fit_relative,
    nonnegative_least_squares,
    num_terms,
    row_weights,
)

LEAST_ERROR = 0.04
"""Held-out error (root mean square, relative) below which a sum is good enough as it is."""

BETTER_BY = 0.7
"""A knee is believed where it leaves at most this share of the held-out error."""

WIDEST_GAP = 1 / 3
"""Of the range of sizes, between neighbours. A knee that lies in a wider one looks as if it were elsewhere."""

MIN_SIDE = 2
"""Graphs on each side of a knee: one alone could be an outlier."""


def is_bent(fit: Fit) -> bool:
    """Whether a fit misses the graphs that it was not fitted to by more than it should."""
    return _rms(fit.leave_one_out) > LEAST_ERROR


def find_knee(
    rows: Sequence[Mapping[str, float]],
    sizes: Sequence[float],
    measured_ms: Sequence[float],
    plain: Fit,
    *,
    noise: Sequence[float],
) -> tuple[float, tuple[float, ...]] | None:
    """The knee, and the error of each row where the others alone choose knee and costs. None where a sum does.

    Knees lie halfway between the sizes of neighbouring graphs; the one with the least squares is taken.

    Args:
        rows: Features of each graph, without a knee.
        sizes: Millions of weights that each graph reads.
        measured_ms: What was measured.
        plain: The fit without a knee.
        noise: Relative scatter of each measurement.
    """
    if not is_bent(plain) or len(rows) < num_terms(rows) + 2 + MIN_SPARE_ROWS:
        return None
    w, t, roots = np.array(sizes), np.array(measured_ms, dtype=np.float64), row_weights(noise)
    if np.diff(np.sort(w)).max() > WIDEST_GAP * np.ptp(w):
        return None
    x = np.array([[row[name] for name in plain.columns] for row in rows], dtype=np.float64)
    x *= (roots / t)[:, None]
    scale = roots / t
    errors = []
    for i in range(len(t)):
        rest = np.arange(len(t)) != i
        found = _best(x[rest], w[rest], scale[rest], roots[rest])
        if found is None:
            return None
        knee, costs = found
        predicted = float(np.append(x[i], max(0.0, w[i] - knee) * scale[i]) @ costs)
        errors.append(predicted / float(roots[i]) - 1)
    found = _best(x, w, scale, roots)
    if found is None or _rms(errors) > BETTER_BY * _rms(plain.leave_one_out):
        return None
    return found[0], tuple(errors)


def fit_with_knee(
    rows: Sequence[Mapping[str, float]],
    sizes: Sequence[float],
    measured_ms: Sequence[float],
    knee: float,
    *,
    noise: Sequence[float],
) -> Fit:
    """The fit with the weights above `knee` as one more term. The knee is a parameter that these rows chose."""
    bent = [{**row, BEYOND: max(0.0, size - knee)} for row, size in zip(rows, sizes, strict=True)]
    fit = fit_relative(bent, measured_ms, noise=noise, spent=1)
    return replace(fit, knee=knee) if BEYOND in fit.columns else fit_relative(rows, measured_ms, noise=noise)


def _best(x: FloatArray, w: FloatArray, scale: FloatArray, roots: FloatArray) -> tuple[float, FloatArray] | None:
    """The knee with the least squares, and its costs."""
    best: tuple[float, float, FloatArray] | None = None
    between = list(pairwise(np.unique(w).tolist()))
    for low, high in between[MIN_SIDE - 1 : len(between) - MIN_SIDE + 1]:
        knee = (low + high) / 2
        bent = np.column_stack([x, np.maximum(0.0, w - knee) * scale])
        costs = nonnegative_least_squares(bent, roots)
        residual = bent @ costs - roots
        squares = float(residual @ residual)
        if best is None or squares < best[0]:
            best = squares, knee, costs
    return None if best is None else best[1:]


def _rms(errors: Sequence[float]) -> float:
    return math.sqrt(sum(error * error for error in errors) / len(errors))
