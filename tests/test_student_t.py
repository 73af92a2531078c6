"""Quantiles against those of printed tables."""

from __future__ import annotations

import pytest

from amoeba_export.student_t import student_t


@pytest.mark.parametrize(
    ("probability", "degrees", "expected"),
    [
        (0.95, 1, 6.3138),
        (0.95, 2, 2.9200),
        (0.95, 3, 2.3534),
        (0.95, 6, 1.9432),
        (0.95, 30, 1.6973),
        (0.975, 1, 12.7062),
        (0.975, 2, 4.3027),
        (0.99, 4, 3.7469),
        (0.995, 7, 3.4995),
        (0.9, 15, 1.3406),
        (0.975, 500, 1.9647),
    ],
)
def test_it_is_the_tabulated_one(probability: float, degrees: int, expected: float) -> None:
    assert student_t(probability, degrees) == pytest.approx(expected, abs=1e-4)
