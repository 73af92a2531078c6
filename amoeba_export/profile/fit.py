"""Relative, non-negative least squares with error bars, for a dozen rows and a handful of columns."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from amoeba_export.student_t import student_t

FloatArray = NDArray[np.float64]

MIN_SPARE_ROWS = 2
"""Rows beyond the number of terms without which the residuals say nothing about the error."""

ORDINARY_NOISE = 0.03
"""Relative scatter between rounds at which a measurement counts half. A quiet machine stays well below."""

_COLLINEAR = 1e-6
_ONE_SIDE = 0.95
"""So that both sides leave out 10 %."""
_MIN_SIGMA = 0.002
"""No machine repeats itself more closely than that; a smaller sigma would call rounding an outlier."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Fit:
    """A cost in milliseconds per term, and how far to trust their sum.

    Evaluating it uses plain float arithmetic in a fixed order, no BLAS: a stored fit gives the same bits everywhere.

    Attributes:
        columns: The terms that the rows could tell apart. The cost of a term that is missing here is part of the
            others': they always came together.
        coefficients_ms: Cost of each column, never negative.
        sigma: Relative standard error of one undisturbed row, from the residuals.
        inverse_gram: (X^T X)^-1 of the relative, weighted rows X, for the error of a prediction.
        spare_rows: Rows minus columns.
        leave_one_out: Of each row, the relative error (predicted / measured - 1) of the fit to all other rows.
        studentized: The same in units of the error to be expected, by the residuals of the other rows alone: an
            outlier cannot hide behind the error bars that it widens. 0 where the other rows cannot tell.
        knee: Millions of weights above which the term `beyond_knee` counts them; None without that term.
    """

    columns: tuple[str, ...]
    coefficients_ms: tuple[float, ...]
    sigma: float
    inverse_gram: tuple[tuple[float, ...], ...]
    spare_rows: int
    leave_one_out: tuple[float, ...]
    studentized: tuple[float, ...]
    knee: float | None = None

    def milliseconds(self, row: Mapping[str, float]) -> float:
        """The sum of the terms."""
        total_ms = 0.0
        for column, cost in zip(self.columns, self.coefficients_ms, strict=True):
            total_ms += row[column] * cost
        return total_ms

    def predict(self, row: Mapping[str, float]) -> tuple[float, float]:
        """Milliseconds, and the relative half-width of the interval that holds 9 of 10 new measurements.

        The half-width is Student's t times sigma * sqrt(1 + h), h being the leverage of `row`: it grows away from what
        was measured. Leverage counts all columns, also those that came out as zero.
        """
        x = [row[column] for column in self.columns]
        total_ms = self.milliseconds(row)
        if total_ms <= 0:
            return 0.0, math.inf
        leverage = 0.0
        for value, line in zip(x, self.inverse_gram, strict=True):
            for other, entry in zip(x, line, strict=True):
                leverage += value * entry * other
        leverage = max(leverage, 0.0) / total_ms**2
        return total_ms, student_t(_ONE_SIDE, self.spare_rows) * self.sigma * math.sqrt(1 + leverage)

    @property
    def median_error(self) -> float:
        """Median absolute leave-one-out error, the figure to quote for a table."""
        return float(np.median(np.abs(self.leave_one_out)))


def num_terms(rows: Sequence[Mapping[str, float]]) -> int:
    """How many terms `rows` can tell apart."""
    names = tuple(rows[0])
    x = np.array([[row[name] for name in names] for row in rows], dtype=np.float64)
    return len(_independent(x))


def fit_relative(
    rows: Sequence[Mapping[str, float]], measured_ms: Sequence[float], *, noise: Sequence[float] = (), spent: int = 0
) -> Fit:
    """Minimise the sum of w ((predicted - measured) / measured)^2 over non-negative costs.

    Relative, because a budget is missed by percents: absolute residuals would let the slow graphs decide everything.
    w = 1 / (1 + (noise / `ORDINARY_NOISE`)^2): a graph that was disturbed while it was measured counts for less.

    Args:
        rows: The features of each measured graph, all with the same keys. At least `MIN_SPARE_ROWS` more than
            `num_terms(rows)`.
        measured_ms: What was measured, positive.
        noise: Relative scatter of each measurement; none known if empty.
        spent: Parameters that were chosen by the same rows before.
    """
    names = tuple(rows[0])
    t = np.array(measured_ms, dtype=np.float64)
    roots = row_weights(noise or [0.0] * len(t))
    x = np.array([[row[name] for name in names] for row in rows], dtype=np.float64) / t[:, None]
    kept = _independent(x)
    x = x[:, kept] * roots[:, None]
    costs = nonnegative_least_squares(x, roots)
    spare_rows = len(t) - len(kept) - spent
    assert spare_rows >= MIN_SPARE_ROWS, "the caller checks that there are enough rows"
    residual = x @ costs - roots
    errors, studentized = _leave_one_out(x, roots)
    return Fit(
        columns=tuple(names[i] for i in kept),
        coefficients_ms=tuple(costs.tolist()),
        sigma=math.sqrt(float(residual @ residual) / spare_rows),
        inverse_gram=tuple(tuple(line) for line in np.linalg.inv(x.T @ x).tolist()),
        spare_rows=spare_rows,
        leave_one_out=tuple(errors),
        studentized=tuple(studentized),
    )


def row_weights(noise: Sequence[float]) -> FloatArray:
    """The square root of w of each row, by its relative scatter."""
    roots: FloatArray = 1 / np.sqrt(1 + (np.array(noise, dtype=np.float64) / ORDINARY_NOISE) ** 2)
    return roots


def _leave_one_out(x: FloatArray, y: FloatArray) -> tuple[list[float], list[float]]:
    num_rows, num_columns = x.shape
    errors, studentized = [], []
    for i in range(num_rows):
        rest, others = np.delete(x, i, axis=0), np.delete(y, i)
        costs = nonnegative_least_squares(rest, others)
        missed = float(x[i] @ costs - y[i])
        errors.append(missed / float(y[i]))
        if len(_independent(rest)) < num_columns:
            studentized.append(0.0)
            continue
        residual = rest @ costs - others
        sigma = max(_MIN_SIGMA, math.sqrt(float(residual @ residual) / (num_rows - 1 - num_columns)))
        leverage = float(x[i] @ np.linalg.solve(rest.T @ rest, x[i]))
        studentized.append(missed / (sigma * math.sqrt(1 + leverage)))
    return errors, studentized


def _independent(x: FloatArray) -> list[int]:
    """Columns that are no combination of columns to their left (modified Gram-Schmidt)."""
    kept: list[int] = []
    basis: list[FloatArray] = []
    for i in range(x.shape[1]):
        column = x[:, i].copy()
        norm = float(np.linalg.norm(column))
        for direction in basis:
            column -= (direction @ column) * direction
        rest = float(np.linalg.norm(column))
        if norm > 0 and rest > _COLLINEAR * norm:
            kept.append(i)
            basis.append(column / rest)
    return kept


def nonnegative_least_squares(x: FloatArray, y: FloatArray) -> FloatArray:
    """Find the argmin over b >= 0 of ||x b - y||^2, by the active-set method of Lawson and Hanson (1974), ch. 23.

    Own code because scipy would be a 100 MB dependency for this one function.
    """
    scale = np.linalg.norm(x, axis=0)
    scale[scale == 0] = 1.0
    a = x / scale
    num_columns = a.shape[1]
    b = np.zeros(num_columns)
    free = np.zeros(num_columns, dtype=bool)
    tolerance = 1e-12 * float(np.linalg.norm(y)) * max(a.shape)
    for _ in range(3 * num_columns):
        gradient = a.T @ (y - a @ b)
        gradient[free] = -np.inf
        if free.all() or gradient.max() <= tolerance:
            break
        free[int(gradient.argmax())] = True
        while True:
            trial = np.zeros(num_columns)
            trial[free] = np.linalg.lstsq(a[:, free], y, rcond=None)[0]
            if (trial[free] > 0).all():
                b = trial
                break
            blocked = free & (trial <= 0)
            step = float((b[blocked] / (b[blocked] - trial[blocked])).min())
            b = b + step * (trial - b)
            free &= b > 1e-15
            b[~free] = 0.0
    solution: FloatArray = b / scale
    return solution
