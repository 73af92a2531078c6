"""What the closed loop does next, on histories that are written down."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest

from amoeba_export.application.choose import MARGIN
from amoeba_export.application.trials import MAX_BUILDS, Trial, best_of, next_step, seen_in
from amoeba_export.errors import NothingFits
from amoeba_export.ir import Budget, DenseArchitecture, Shape, SubnetPlan
from amoeba_export.search import Candidate, Quality, SearchResult, Seen
from tests.application.test_outcome import NARROW, WIDE, outcome
from tests.profile.machines import SMOL, dense

TOO_WIDE = (0.6, 1.4, 1.0, 0.7, 1.3)


def layers(depth: int) -> DenseArchitecture:
    return dense(*[(9, 3, 1536)] * depth)


def candidate(depth: int, loss: float = 3.0) -> Candidate:
    return Candidate(
        shape=Shape(depth, 1.0),
        policy="uniform",
        dense=layers(depth),
        quality=Quality(loss, "measured"),
        predicted_ms=10.0,
        uncertainty=0.0,
        decode_ms=10.0,
        prefill_ms=50.0,
        e2e_ms=1000.0,
        memory_mb=None,
        fits=True,
        on_pareto=True,
        make_plan=lambda: SubnetPlan.full(SMOL),
    )


def result(depth: int, loss: float = 3.0) -> SearchResult:
    budget = Budget.parse("10ms")
    found = (candidate(depth, loss),)
    return SearchResult(candidates=found, limits=((budget, 10.0),), quality_metric="loss", higher_is_better=False)


def trial(depth: int, use: float, scatter: Sequence[float] = NARROW, loss: float = 3.0) -> Trial:
    found = result(depth, loss)
    return Trial(
        plan=SubnetPlan.full(SMOL), candidate=found.best, search=found, outcome=outcome(use, scatter), expected_ms=10.0
    )


def chooses(depth: int | None) -> Callable[[Seen], SearchResult]:
    """A search that comes to `depth`, or finds nothing."""

    def search(seen: Seen) -> SearchResult:
        if depth is None:
            raise NothingFits("decode p50 <= 10 ms", "20x0.5", "11 ms", next_step="Allow 11 ms.")
        return result(depth)

    return search


@pytest.mark.parametrize(
    ("history", "chosen", "build", "depth"),
    [
        pytest.param([], 30, True, 30, id="the first choice is built"),
        pytest.param([trial(30, 1.1)], 27, True, 27, id="over the budget: the next one"),
        pytest.param([trial(30, 0.99, WIDE)], 27, True, 27, id="too close to be sure: the next one"),
        pytest.param([trial(27, 0.8)], 29, True, 29, id="far under it: a larger one"),
        pytest.param([trial(27, 0.98)], 29, False, 27, id="kept and used: done, no search"),
        pytest.param([trial(30, 1.1), trial(27, 0.9)], 27, False, 27, id="nothing new is chosen"),
        pytest.param([trial(30, 1.1), trial(27, 0.9)], 30, False, 30, id="an earlier one is chosen again"),
        pytest.param([trial(30, 1.1)], None, False, 30, id="nothing fits any more"),
        pytest.param([trial(30 - i, 1.1) for i in range(MAX_BUILDS)], 20, False, 20, id="enough was built"),
        pytest.param([trial(30 - i, 1.1) for i in range(MAX_BUILDS - 1)], 20, True, 20, id="one more may be built"),
    ],
)
def test_next_step(history: list[Trial], chosen: int | None, build: bool, depth: int) -> None:
    step = next_step(history, chooses(chosen))
    assert (step.build, step.search.best.shape.depth) == (build, depth)


def test_before_anything_was_built_nothing_fits_is_an_error() -> None:
    with pytest.raises(NothingFits):
        next_step([], chooses(None))


def test_a_search_learns_what_was_measured() -> None:
    assert seen_in([]) == Seen(margin=MARGIN)
    over, under = trial(30, 1.1), trial(27, 0.9, TOO_WIDE)
    seen = seen_in([over, under])
    assert seen.full == under.outcome.full
    assert [known for known, _ in seen.measured] == [layers(30), layers(27)]
    assert seen.refused == (layers(30), layers(27)), "the second cannot be shown to keep the budget"
    assert seen.margin == pytest.approx((over.outcome.doubt + under.outcome.doubt) / 2)
    assert seen.margin > MARGIN


@pytest.mark.parametrize(
    ("history", "depth"),
    [
        ([trial(30, 1.1), trial(27, 0.8), trial(24, 0.6, loss=2.9)], 24),
        ([trial(30, 0.9, TOO_WIDE, loss=2.0), trial(27, 0.8, loss=3.0)], 27),
        ([trial(27, 0.8), trial(26, 0.7)], 26),
        ([trial(30, 0.9, TOO_WIDE, loss=2.0), trial(27, 1.2)], 30),
        ([trial(30, 1.3), trial(27, 1.2)], 27),
    ],
    ids=["best quality", "shown before seeming", "a tie: the faster", "none is shown", "all are over"],
)
def test_best_of(history: list[Trial], depth: int) -> None:
    assert best_of(history).candidate.shape.depth == depth
