from __future__ import annotations

import math
from random import Random

import pytest

from amoeba_export.profile import Comparison, compare_rounds, early_verdict


def test_a_machine_that_slows_down_cancels_out() -> None:
    baseline = [10.0, 12.0, 15.0, 11.0, 13.0]
    found = compare_rounds([1.04 * ms for ms in baseline], baseline)
    assert found.ratio == pytest.approx(1.04)
    assert (found.low, found.high) == (pytest.approx(1.04), pytest.approx(1.04))
    assert found.rounds == 5


def test_the_interval_is_that_of_signed_ranks() -> None:
    """Of 1..6, a rank sum of 2 or less has chance 3 / 64: the averages of pairs from the 3rd to the 19th of 21 remain.

    They are those of the logarithms 0, d, 3d, 7d, 15d, 31d, whose smallest are 0, d/2, d and largest 31d, 23d, 19d.
    """
    d = 0.01
    found = compare_rounds([math.exp(n * d) for n in (0, 1, 3, 7, 15, 31)], [1.0] * 6)
    assert math.log(found.low) == pytest.approx(d)
    assert math.log(found.high) == pytest.approx(19 * d)
    assert math.log(found.ratio) == pytest.approx(7.5 * d)


def test_one_disturbed_round_changes_little() -> None:
    quiet = [1.00, 1.01, 1.02, 1.00, 1.01, 1.02, 1.01]
    found = compare_rounds([*quiet, *quiet, 1.5], [1.0] * 15)
    assert 1.0 < found.low < found.ratio < found.high < 1.02
    assert found.ratio == pytest.approx(1.01)


def test_four_rounds_prove_nothing() -> None:
    found = compare_rounds([2.0] * 4, [1.0] * 4)
    assert found == Comparison(ratio=pytest.approx(2.0), low=0.0, high=math.inf, rounds=4)
    assert found.verdict(0.03) == "undecided"
    assert found.rounds_to_decide(0.03) is None


def test_an_early_verdict_is_seldom_wrong() -> None:
    """A model 6 % faster or slower than a limit, rounds of 0.5 % to 8 %: 3 of them say so, or nothing."""
    random = Random(0)
    said: dict[tuple[str, bool], int] = {}
    for scatter in (0.005, 0.02, 0.08):
        for is_slower in (True, False):
            for _ in range(1000):
                centre = 0.06 if is_slower else -0.06
                rounds = [math.exp(centre + random.gauss(0, scatter)) for _ in range(3)]
                verdict = early_verdict(rounds, [1.0] * 3)
                said[verdict, is_slower] = said.get((verdict, is_slower), 0) + 1
    assert said.get(("slower", False), 0) + said.get(("not slower", True), 0) <= 6
    assert said["slower", True] > 500
    assert said["not slower", False] > 500


def test_at_a_limit_an_early_verdict_is_chance_of_one_in_two_hundred() -> None:
    """So much that the margin of 5 % hardly counts: rounds of 30 %."""
    random = Random(1)
    verdicts = [early_verdict([math.exp(random.gauss(0, 0.3)) for _ in range(3)], [1.0] * 3) for _ in range(4000)]
    assert 0.002 < verdicts.count("not slower") / 4000 < 0.008
    assert 0.002 < verdicts.count("slower") / 4000 < 0.008


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
