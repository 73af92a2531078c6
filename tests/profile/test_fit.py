from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest

from amoeba_export.profile.fit import fit_relative, nonnegative_least_squares, num_terms


def _by_trying_every_support(x: np.ndarray, y: np.ndarray) -> float:
    best = float(y @ y)
    for size in range(1, x.shape[1] + 1):
        for support in combinations(range(x.shape[1]), size):
            b = np.linalg.lstsq(x[:, support], y, rcond=None)[0]
            if (b >= 0).all():
                best = min(best, float(np.sum((x[:, support] @ b - y) ** 2)))
    return best


@pytest.mark.parametrize("seed", range(20))
def test_nonnegative_least_squares_is_the_best_of_all_supports(seed: int) -> None:
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((10, 6))
    y = rng.standard_normal(10)
    b = nonnegative_least_squares(x, y)
    assert (b >= 0).all()
    assert float(np.sum((x @ b - y) ** 2)) == pytest.approx(_by_trying_every_support(x, y), rel=1e-9)


def test_nonnegative_least_squares_takes_columns_of_any_scale() -> None:
    x = np.array([[1e-6, 1e5], [2e-6, 1e5], [3e-6, 3e5]])
    b = nonnegative_least_squares(x, x @ np.array([4e6, 2e-5]))
    assert b == pytest.approx([4e6, 2e-5], rel=1e-9)


def test_nothing_fits_better_than_zero() -> None:
    assert nonnegative_least_squares(np.ones((3, 2)), -np.ones(3)).tolist() == [0.0, 0.0]


def test_fit_recovers_costs_and_drops_a_column_that_follows_from_others() -> None:
    rng = np.random.default_rng(1)
    rows = []
    for _ in range(9):
        blocks, heads = float(rng.integers(10, 30)), float(rng.random() * 20)
        rows.append({"base": 1.0, "blocks": blocks, "heads": heads, "twice": 2 * heads})
    measured = [5 + 0.5 * row["blocks"] + 0.1 * row["heads"] for row in rows]
    assert num_terms(rows) == 3
    fit = fit_relative(rows, measured)
    assert fit.columns == ("base", "blocks", "heads")
    assert fit.coefficients_ms == pytest.approx((5, 0.5, 0.1), rel=1e-9)
    assert fit.spare_rows == 6
    assert fit.sigma < 1e-12
    assert max(map(abs, fit.leave_one_out)) < 1e-9
    ms, error = fit.predict({"base": 1.0, "blocks": 40.0, "heads": 10.0, "twice": 20.0})
    assert ms == pytest.approx(26)
    assert error < 1e-9


def test_residuals_are_relative() -> None:
    """One column, two times: the relative optimum is not the mean."""
    fit = fit_relative([{"base": 1.0}] * 3, [1.0, 2.0, 2.0])
    # d/db sum((b/t - 1)^2) = 0  ->  b = sum(1/t) / sum(1/t^2)
    assert fit.coefficients_ms == pytest.approx(((1 + 0.5 + 0.5) / (1 + 0.25 + 0.25),))


def test_a_disturbed_measurement_counts_for_less() -> None:
    rows = [{"base": 1.0, "blocks": float(blocks)} for blocks in range(8)]
    measured = [5 + 0.5 * row["blocks"] for row in rows]
    measured[3] *= 1.4
    plain = fit_relative(rows, measured)
    weighted = fit_relative(rows, measured, noise=[0.0, 0.01, 0.0, 0.3, 0.0, 0.01, 0.0, 0.0])
    truth = np.array([5, 0.5])
    assert np.abs(weighted.coefficients_ms - truth).max() < 0.05 < np.abs(plain.coefficients_ms - truth).max()
    assert weighted.leave_one_out[3] == pytest.approx(1 / 1.4 - 1, rel=0.02)
    assert weighted.sigma < plain.sigma / 5
