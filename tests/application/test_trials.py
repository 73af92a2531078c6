"""What the closed loop does next, on histories that are written down."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import cast

import pytest

from amoeba_export.application.session import Session
from amoeba_export.application.trials import MARGIN, MAX_BUILDS, Choice, Trial, best_of, next_step, seen_in
from amoeba_export.errors import NothingFits
from amoeba_export.ir import Budget, DenseArchitecture, Shape, SubnetPlan
from amoeba_export.search import Candidate, Found, Quality, SearchResult, Seen
from tests.application.test_outcome import NARROW, WIDE, latency, outcome
from tests.profile.machines import SMOL, dense

TOO_WIDE = (0.6, 1.4, 1.0, 0.7, 1.3)


def layers(depth: int) -> DenseArchitecture:
    return dense(*[(9, 3, 1536)] * depth)


def choice(depth: int, loss: float = 3.0, dtype: str = "fp32") -> Choice:
    candidate = Candidate(
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
    search = SearchResult(
        candidates=(candidate,),
        limits=((Budget.parse("10ms"), 10.0),),
        quality_metric="loss",
    )
    rise = {"fp32": 0.0, "int4": 0.3}[dtype]
    return Choice(session=cast(Session, None), found=Found(dtype=dtype, rise=rise, search=search))


def trial(depth: int, use: float, scatter: Sequence[float] = NARROW, loss: float = 3.0, dtype: str = "fp32") -> Trial:
    return Trial(
        choice=choice(depth, loss, dtype),
        plan=SubnetPlan.full(SMOL),
        outcome=outcome(use, scatter),
        expected_ms=10.0,
    )


def chooses(depth: int | None, dtype: str = "fp32") -> Callable[[Sequence[Trial]], Choice]:
    """A search that comes to `depth`, or finds nothing."""

    def search(history: Sequence[Trial]) -> Choice:
        if depth is None:
            raise NothingFits("decode p50 <= 10 ms", "20x0.5", "11 ms", next_step="Allow 11 ms.")
        return choice(depth, dtype=dtype)

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
    assert (step.build, step.choice.candidate.shape.depth) == (build, depth)


def test_before_anything_was_built_nothing_fits_is_an_error() -> None:
    with pytest.raises(NothingFits):
        next_step([], chooses(None))


def test_another_precision_of_a_shape_is_new() -> None:
    assert next_step([trial(30, 1.1)], chooses(30, "int4")).build
    assert not next_step([trial(30, 1.1)], chooses(30, "fp32")).build


WHOLES = {"fp32": latency([20.0] * 5), "int4": latency([8.0] * 5)}


def seen(history: Sequence[Trial], dtype: str, *, relative: bool = True) -> Seen:
    return seen_in(history, dtype, WHOLES, layers(30), relative=relative)


def test_before_anything_was_built_the_whole_models_are_known() -> None:
    assert seen([], "int4") == Seen(full=WHOLES["fp32"], measured=((layers(30), WHOLES["int4"]),), margin=MARGIN)


def test_a_search_learns_what_was_measured_in_its_precision() -> None:
    over, under = trial(29, 1.1), trial(27, 0.9, TOO_WIDE, dtype="int4")
    fine, coarse = seen([over, under], "fp32"), seen([over, under], "int4")
    assert fine.full == coarse.full == under.outcome.full
    assert [known for known, _ in fine.measured] == [layers(30), layers(29)]
    assert [known for known, _ in coarse.measured] == [layers(30), layers(27)]
    assert (fine.refused, coarse.refused) == ((layers(29),), (layers(27),)), "27 cannot be shown to keep the budget"
    assert fine.margin == pytest.approx((over.outcome.doubt + under.outcome.doubt) / 2)
    assert fine.margin > MARGIN


def test_a_slower_run_makes_the_whole_models_of_another_run_slower_too() -> None:
    """The full model took 20 ms before and 25 in the run of the trial."""
    slow = replace(trial(29, 1.1), outcome=replace(outcome(1.1, NARROW), full=latency([25.0] * 5)))
    (_, whole), _ = seen([slow], "fp32").measured
    assert whole.decode.p50_ms == 25.0
    ((_, whole),) = seen([slow], "int4").measured
    assert whole.decode.p50_ms == pytest.approx(10.0)
    ((_, whole),) = seen([slow], "int4", relative=False).measured
    assert whole.decode.p50_ms == 8.0


@pytest.mark.parametrize(
    ("history", "depth"),
    [
        ([trial(30, 1.1), trial(27, 0.8), trial(24, 0.6, loss=2.9)], 24),
        ([trial(30, 0.9, TOO_WIDE, loss=2.0), trial(27, 0.8, loss=3.0)], 27),
        ([trial(27, 0.8), trial(26, 0.7)], 26),
        ([trial(30, 0.9, TOO_WIDE, loss=2.0), trial(27, 1.2)], 30),
        ([trial(30, 1.3), trial(27, 1.2)], 27),
        ([trial(27, 0.9, loss=3.2), trial(30, 0.8, loss=3.0, dtype="int4")], 27),
    ],
    ids=[
        "best quality",
        "shown before seeming",
        "a tie: the faster",
        "none is shown",
        "all are over",
        "rounding counts",
    ],
)
def test_best_of(history: list[Trial], depth: int) -> None:
    assert best_of(history).choice.candidate.shape.depth == depth
