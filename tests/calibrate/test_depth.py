from __future__ import annotations

import math
import random
from pathlib import Path

import numpy as np
import pytest

from amoeba_export.calibrate.depth import Challenge, fill_table, search_depth
from amoeba_export.errors import NotANumber, UsageError


def test_replays_the_recorded_search(goldens: Path) -> None:
    """Same evaluations in the same order, same strategies, same metrics as the published code."""
    trace = np.load(goldens / "C/dp/dp_trace.npz")
    # Our own recording, in the container that the published code writes.
    final = np.load(goldens / "C/dp/final_strategy.npy", allow_pickle=True).item()
    recorded = iter(zip(trace["active_layers"], trace["metric"], strict=True))

    def evaluate(active: np.ndarray, bound: float | None = None) -> float:
        wanted, metric = next(recorded)
        np.testing.assert_array_equal(active, wanted.astype(bool))
        return float(metric)

    keep_last = int(trace["dp_keep_last_layer"])
    num_layers = trace["active_layers"].shape[1]
    found = search_depth(
        evaluate, num_layers=num_layers, max_removed=num_layers - int(trace["min_num_layer"]), keep_last=keep_last
    )
    assert next(recorded, None) is None
    assert found.metric == {m: float(metric) for m, metric in final["metric"].items()}
    for removed, active in final["strategy"].items():
        np.testing.assert_array_equal(found.active[removed], active.astype(bool))
    assert found.active.keys() == final["strategy"].keys()


def table(seed: int, num_layers: int):
    """A metric per choice of layers, near the number of removed ones."""
    known: dict[tuple[bool, ...], float] = {}
    rng = random.Random(seed)

    def evaluate(active: np.ndarray, bound: float | None = None) -> float:
        return known.setdefault(tuple(active), num_layers - int(active.sum()) + rng.random() * 2)

    return evaluate


def test_an_answer_that_only_respects_the_bound_changes_nothing() -> None:
    exact = table(0, 8)
    bounds = []

    def lazy(active: np.ndarray, bound: float | None = None) -> float:
        bounds.append(bound)
        metric = exact(active)
        return metric if bound is None or metric < bound else bound

    found, reference = (search_depth(f, num_layers=8, max_removed=5, keep_last=1) for f in (lazy, exact))
    assert found.metric == reference.metric
    assert [bound is None for bound in bounds[:6]] == [True, False, True, False, False, True]


def test_equal_metrics_keep_the_earlier_choice() -> None:
    found = search_depth(lambda active, bound=None: 1.0, num_layers=4, max_removed=2)
    np.testing.assert_array_equal(found.active[1], [True, True, True, False])
    np.testing.assert_array_equal(found.active[2], [True, True, False, False])


def test_max_mode_mirrors_min_mode() -> None:
    lower = search_depth(table(3, 7), num_layers=7, max_removed=4, keep_last=1)
    metric = table(3, 7)
    higher = search_depth(
        lambda active, bound=None: -metric(active), num_layers=7, max_removed=4, keep_last=1, mode="max"
    )
    assert {m: -value for m, value in higher.metric.items()} == lower.metric


@pytest.mark.parametrize("beam", [2, 4])
def test_a_wider_beam_is_never_worse(beam: int) -> None:
    wins = 0
    for seed in range(60):
        metric = table(seed, 8)
        narrow = search_depth(metric, num_layers=8, max_removed=5)
        wide = search_depth(metric, num_layers=8, max_removed=5, beam=beam)
        assert all(wide.metric[m] <= narrow.metric[m] for m in narrow.metric)
        wins += wide.metric[4] < narrow.metric[4]
    assert wins > 10


def test_a_row_is_judged_at_once_and_names_its_rivals() -> None:
    rows: list[list[Challenge]] = []

    def judge(challenges):
        rows.append(list(challenges))
        return [float(len(rows))] * len(challenges)

    fill_table(judge, num_layers=4, max_removed=2, keep_last=1)
    assert [len(row) for row in rows] == [1, 2, 2]
    assert [challenge.removed for challenge in rows[2]] == [[0], [0, 1]]
    assert rows[2][0].rival is not None
    assert rows[2][0].rival.metric == 2.0


@pytest.mark.parametrize(("num_layers", "max_removed", "keep_last"), [(4, 4, 0), (4, 4, 1), (4, 0, 0)])
def test_refuses_to_remove_what_is_not_there(num_layers: int, max_removed: int, keep_last: int) -> None:
    with pytest.raises(UsageError) as caught:
        search_depth(table(0, 4), num_layers=num_layers, max_removed=max_removed, keep_last=keep_last)
    assert caught.value.what == (
        f"{max_removed} layers cannot be removed from a model with 4 layers whose last {keep_last} stay (beam 1)."
    )
    assert caught.value.next_step == "Remove between 1 and 3 layers, with a beam of at least 1."


def test_a_metric_that_is_nan_is_an_error() -> None:
    with pytest.raises(NotANumber) as caught:
        search_depth(lambda active, bound=None: math.nan, num_layers=4, max_removed=2, keep_last=1)
    assert str(caught.value) == (
        "The metric of the model without layers 2 is not a number.\n"
        "  next:  Check the model: run it on a sentence, or get its weights again."
    )
    assert caught.value.exit_code == 3
