"""What rounds show of budgets, on rounds that are written down."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median

import pytest

from amoeba_export.application.costs import MOST_ROUNDS
from amoeba_export.application.outcome import Outcome, sure
from amoeba_export.ir import SILENT, Budget, Latency, Timing, Workload

NARROW = (0.99, 1.0, 1.01, 1.0, 0.995)
WIDE = (0.9, 1.0, 1.1, 1.05, 0.95)


def latency(decode_ms: Sequence[float], prefill_ms: float = 50.0, tail: float = 1.2, *, rounds: bool = True) -> Latency:
    typical_ms = median(decode_ms)
    return Latency(
        decode=Timing(p50_ms=typical_ms, p90_ms=tail * typical_ms, num_samples=9),
        prefill=Timing(p50_ms=prefill_ms, p90_ms=tail * prefill_ms, num_samples=9),
        source="measured",
        workload=Workload(),
        rounds=tuple((ms, prefill_ms) for ms in decode_ms) if rounds else (),
    )


def outcome(use: float, scatter: Sequence[float], *budgets: Budget, rounds: bool = True) -> Outcome:
    """A subnet that typically takes `use` of a budget of 10 ms."""
    return Outcome(
        budgets=budgets or (Budget.parse("10ms"),),
        full=latency([20.0] * len(scatter), rounds=rounds),
        latency=latency([10 * use * x for x in scatter], rounds=rounds),
    )


@pytest.mark.parametrize(
    ("use", "scatter", "is_kept", "is_decided"),
    [
        (0.97, NARROW, True, True),
        (0.995, NARROW, False, False),
        (0.97, WIDE, False, False),
        (0.8, WIDE, True, True),
        (1.05, NARROW, False, True),
        (1.05, WIDE, False, False),
    ],
)
def test_a_budget_is_kept_when_the_whole_interval_keeps_it(
    use: float, scatter: Sequence[float], is_kept: bool, is_decided: bool
) -> None:
    found = outcome(use, scatter)
    assert found.use == pytest.approx(use)
    assert (found.is_kept, found.is_decided) == (is_kept, is_decided)


@pytest.mark.parametrize(
    ("use", "scatter", "is_decided"),
    [
        (0.9, (0.995, 1.0, 1.005), True),  # the 99 % interval is 3 % to each side
        (0.96, (0.995, 1.0, 1.005), False),
        (0.97, (1.0, 1.0, 1.0), False),  # chance, that three are equal
        (0.9, (0.98, 1.0, 1.02), False),
        (1.1, (0.995, 1.0, 1.005), True),
        (1.02, (0.995, 1.0, 1.005), False),
        (0.6, (1.0, 1.0, 1.25), False),  # one was disturbed
        (0.5, (1.0,), False),
    ],
)
def test_three_rounds_decide_what_is_beyond_doubt(use: float, scatter: Sequence[float], is_decided: bool) -> None:
    found = outcome(use, scatter)
    assert found.is_decided == is_decided
    assert found.is_kept == (use < 1)
    assert not found.has_interval


def test_of_several_budgets_three_rounds_must_decide_each() -> None:
    far, close = Budget.parse("80ms", metric="prefill"), Budget.parse("51ms", metric="prefill")
    assert outcome(0.5, (0.995, 1.0, 1.005), Budget.parse("10ms"), far).is_decided
    assert not outcome(0.5, (0.995, 1.0, 1.005), Budget.parse("10ms"), close).is_decided
    missed = Budget.parse("40ms", metric="prefill")
    assert outcome(0.99, (0.995, 1.0, 1.005), Budget.parse("10ms"), missed).is_decided


def test_doubt_is_how_far_below_more_rounds_could_tell() -> None:
    """Five rounds have an interval up to the highest: 15 of the kind would have one that is narrower by sqrt(3)."""
    found = outcome(0.97, WIDE)
    assert found.doubt == pytest.approx(1 - 1.1 ** -((5 / MOST_ROUNDS) ** 0.5), rel=0.02)
    assert outcome(0.97, NARROW).doubt < 0.01
    assert outcome(0.5, WIDE).doubt == pytest.approx(found.doubt)
    assert outcome(0.97, [1.0] * 5).doubt == 0


def test_without_an_interval_the_median_is_believed() -> None:
    few = outcome(0.99, (1.1, 1.0, 0.9))
    assert few.is_kept
    assert not few.is_decided
    assert few.doubt == 0
    for none in (outcome(0.99, WIDE, rounds=False), outcome(0.99, WIDE)):
        unequal = Outcome(budgets=none.budgets, full=latency([20.0], rounds=True), latency=none.latency)
        assert unequal.is_kept
        assert unequal.is_decided
        assert unequal.doubt == 0
    assert not outcome(1.01, WIDE, rounds=False).is_kept


def test_every_budget_must_be_kept() -> None:
    """Prefill takes 50 ms of 60 or of 40."""
    decode = Budget.parse("50%")
    kept = outcome(0.9, NARROW, decode, Budget.parse("60ms", metric="prefill"))
    assert kept.is_kept
    assert kept.limit_ms == pytest.approx(10)
    assert kept.reached_ms == pytest.approx(9)
    missed = outcome(0.9, NARROW, decode, Budget.parse("40ms", metric="prefill"))
    assert not missed.is_kept
    budget, limit_ms, reached_ms = missed.tightest
    assert (budget.metric, limit_ms, reached_ms) == ("prefill", 40, 50)
    assert missed.use == pytest.approx(1.25)


def test_a_p90_is_compared_with_its_tail() -> None:
    """The median of 9 ms keeps 10 ms, the p90 of 10.8 does not."""
    assert outcome(0.9, NARROW).is_kept
    tailed = outcome(0.9, NARROW, Budget.parse("10ms", percentile=90))
    assert tailed.use == pytest.approx(1.08)
    assert tailed.is_decided
    assert not tailed.is_kept


def test_a_surprise_far_below_the_budget_changes_nothing() -> None:
    """As of a whole model that fits easily."""
    left = [outcome(0.47, NARROW)]
    assert sure(left.pop, expected_use=0.55, progress=SILENT).use == pytest.approx(0.47)


@pytest.mark.parametrize(
    ("uses", "taken"),
    [
        pytest.param([0.93], 0.93, id="about what was expected"),
        pytest.param([1.2, 1.22], 1.22, id="a surprise that a second run confirms"),
        pytest.param([0.7, 0.69], 0.7, id="faster than expected, confirmed: the slower one"),
        pytest.param([1.29, 0.91, 0.92], 0.92, id="the device was busy: the other two agree"),
        pytest.param([0.6, 0.93, 0.91], 0.91, id="the full model was disturbed"),
    ],
)
def test_a_surprise_is_measured_again(uses: list[float], taken: float) -> None:
    left = [outcome(use, NARROW) for use in uses]
    found = sure(lambda: left.pop(0), expected_use=0.9, progress=SILENT)
    assert found.use == pytest.approx(taken) and not left
