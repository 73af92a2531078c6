from __future__ import annotations

import math

import numpy as np
import pytest

from amoeba_export.calibrate.depth import Challenge, Choice, fill_table
from amoeba_export.calibrate.evaluator import KeptLayers
from amoeba_export.calibrate.exact import ExactJudge
from amoeba_export.calibrate.ledger import Ledger, doubling, one_by_one
from amoeba_export.calibrate.racing import RacingJudge
from amoeba_export.errors import NotANumber
from amoeba_export.model.head import Objective
from tests.model.models import random_samples

SAMPLES = random_samples(count=32, length=33, batch=2)


class Made:
    """Scores that a formula makes: segments differ, and each removed layer costs something."""

    def __init__(self, noise: float, num_layers: int = 10) -> None:
        rng = np.random.default_rng(0)
        self.costs_L = rng.random(num_layers)
        self.base = rng.random(SAMPLES.num_segments) * 20
        self.noise = noise
        self.segments: dict[KeptLayers, int] = {}

    def scores(self, cuts, batches):
        per_batch = SAMPLES.batches[0].num_segments
        segments = slice(batches.start * per_batch, batches.stop * per_batch)
        found = []
        for cut in cuts:
            rng = np.random.default_rng(list(cut.active))
            removed_L = ~np.array(cut.active)
            scores = self.base + self.costs_L[removed_L].sum() + self.noise * rng.normal(size=len(self.base))
            found.append(np.maximum(scores, 0.01)[segments])
            self.segments[cut] = self.segments.get(cut, 0) + len(found[-1])
        return found


def search(made: Made, judge_class, chunks, **settings):
    with Ledger(made, chunks) as ledger:
        judge = judge_class(ledger, Objective("loss", SAMPLES), **settings).judge
        return fill_table(judge, num_layers=10, max_removed=5, keep_last=1)


def test_chunks_double() -> None:
    assert doubling(SAMPLES) == [range(1), range(1, 2), range(2, 4), range(4, 8), range(8, 16)]
    assert doubling(random_samples(count=6)) == [range(1), range(1, 2), range(2, 3)]


@pytest.mark.parametrize("noise", [0.01, 0.2])
def test_racing_finds_the_exact_choice_with_fewer_scores(noise: float) -> None:
    exact, racing = Made(noise), Made(noise)
    expected = search(exact, ExactJudge, one_by_one(SAMPLES))
    found = search(racing, RacingJudge, doubling(SAMPLES), confidence=0.95)
    assert {m: choice.active for m, choice in found.items()} == {m: choice.active for m, choice in expected.items()}
    assert sum(racing.segments.values()) < 0.5 * sum(exact.segments.values())


def test_what_is_never_decided_is_decided_exactly() -> None:
    """Differences that drown in noise: all segments are seen, and then the means decide."""
    exact, racing = Made(3.0), Made(3.0)
    expected = search(exact, ExactJudge, one_by_one(SAMPLES))
    found = search(racing, RacingJudge, doubling(SAMPLES), confidence=1 - 1e-12)
    assert {m: choice.active for m, choice in found.items()} == {m: choice.active for m, choice in expected.items()}


def race(candidate: np.ndarray, rival: np.ndarray, *, metric: str = "loss") -> tuple[float | None, int]:
    """The verdict, and how many segments it took."""
    table = {(True, False): candidate, (False, True): rival}
    per_batch, seen = SAMPLES.batches[0].num_segments, []

    class Table:
        def scores(self, cuts, batches):
            seen.append(batches.stop * per_batch)
            return [table[cut.active][batches.start * per_batch : batches.stop * per_batch] for cut in cuts]

    with Ledger(Table(), doubling(SAMPLES)) as ledger:
        judge = RacingJudge(ledger, Objective(metric, SAMPLES), confidence=0.95)  # type: ignore[arg-type]
        verdict = judge.judge([Challenge((True, False), Choice((False, True), 0.0))])[0]
    return verdict, seen[-1]


def test_a_clear_race_ends_early() -> None:
    base = np.random.default_rng(0).random(SAMPLES.num_segments)
    noise = np.random.default_rng(1).normal(size=len(base)) * 0.01
    won, seen = race(base + noise, base + 1)
    assert won is not None
    assert math.isnan(won)
    assert seen == SAMPLES.batches[0].num_segments
    assert race(base + 1, base + noise)[0] is None
    # Accuracy is the other way round.
    assert race(base + 1, base + noise, metric="accuracy")[0] is not None


def test_equal_scores_do_not_beat_the_rival() -> None:
    base = np.random.default_rng(0).random(SAMPLES.num_segments)
    assert race(base, base) == (None, SAMPLES.num_segments)


def test_a_candidate_without_a_rival_is_not_measured() -> None:
    class Unused:
        def scores(self, cuts, batches):
            raise AssertionError

    with Ledger(Unused(), doubling(SAMPLES)) as ledger:
        verdict = RacingJudge(ledger, Objective("loss", SAMPLES), confidence=0.9).judge(
            [Challenge((True, False), None)]
        )
    assert math.isnan(verdict[0])  # type: ignore[arg-type]


def test_nan_is_an_error() -> None:
    with pytest.raises(NotANumber) as caught:
        race(np.full(SAMPLES.num_segments, np.nan), np.ones(SAMPLES.num_segments))
    assert caught.value.what == "The loss of the model without layers 1 is not a number."
