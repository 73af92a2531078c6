from __future__ import annotations

import math

import pytest

from amoeba_export.profile import Comparison, compare_rounds


def test_a_machine_that_slows_down_cancels_out() -> None:
    baseline = [10.0, 12.0, 15.0, 11.0]
    found = compare_rounds([1.04 * ms for ms in baseline], baseline)
    assert found.ratio == pytest.approx(1.04)
    assert (found.low, found.high) == (pytest.approx(1.04), pytest.approx(1.04))
    assert found.rounds == 4


def test_the_interval_is_that_of_students_t() -> None:
    """Logarithms -d, 0, d: mean 0, standard deviation d, and t(0.95, 2 degrees) = 2.920."""
    d = 0.01
    found = compare_rounds([math.exp(-d), 1.0, math.exp(d)], [1.0, 1.0, 1.0])
    assert found.ratio == pytest.approx(1.0)
    assert math.log(found.high) == pytest.approx(2.920 * d / math.sqrt(3), rel=5e-3)
    assert math.log(found.low) == pytest.approx(-math.log(found.high))


def test_two_rounds_prove_nothing() -> None:
    found = compare_rounds([2.0, 2.0], [1.0, 1.0])
    assert found == Comparison(ratio=pytest.approx(2.0), low=0.0, high=math.inf, rounds=2)
    assert found.verdict(0.03) == "undecided"
    assert found.rounds_to_decide(0.03) is None


@pytest.mark.parametrize(
    ("low", "high", "verdict"), [(1.04, 1.06, "slower"), (1.0, 1.03, "not slower"), (1.02, 1.05, "undecided")]
)
def test_only_the_whole_interval_decides(low: float, high: float, verdict: str) -> None:
    assert Comparison(ratio=(low * high) ** 0.5, low=low, high=high, rounds=5).verdict(0.03) == verdict


def test_how_many_rounds_would_tell() -> None:
    """An interval that is twice as wide as its distance from the margin needs four times as many rounds."""
    centre, margin = 1.05, 0.03
    distance = math.log(centre / (1 + margin))
    found = Comparison(ratio=centre, low=0.9, high=centre * math.exp(2 * distance), rounds=5)
    assert found.rounds_to_decide(margin) in (20, 21)
