from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
import torch

from amoeba_export.calibrate.depth import fill_table, search_depth
from amoeba_export.calibrate.evaluator import KeptLayers, LocalScorer
from amoeba_export.calibrate.exact import ExactJudge
from amoeba_export.calibrate.ledger import Ledger, all_at_once, one_by_one
from amoeba_export.errors import NotANumber
from amoeba_export.ir import Supernet
from amoeba_export.model.head import Objective
from amoeba_export.model.layers import LayerStack
from amoeba_export.model.samples import Batch, Samples
from amoeba_export.model.states import StateStore
from tests.model.models import plain_loss, random_samples, whole_model

SAMPLES = random_samples()
RESIDENT = 10**9


def random_cuts(count: int, num_layers: int = 6) -> list[KeptLayers]:
    rng = random.Random(0)
    return [KeptLayers(tuple(rng.random() < 0.6 for _ in range(num_layers))) for _ in range(count)]


def scorer(
    supernet: Supernet, folder: Path, *, memory_bytes: int = RESIDENT, limit_bytes: int = RESIDENT
) -> tuple[LayerStack, LocalScorer]:
    stack = LayerStack(supernet, memory_bytes=memory_bytes)
    states = StateStore(stack, SAMPLES, folder, limit_bytes=limit_bytes)
    return stack, LocalScorer(stack, SAMPLES, "loss", states=states)


def test_losses_are_those_of_the_whole_model(supernet: Supernet, tmp_path: Path) -> None:
    model, objective = whole_model(supernet), Objective("loss", SAMPLES)
    cuts = [KeptLayers((True,) * 6), *random_cuts(8)]
    _, ours = scorer(supernet, tmp_path)
    for cut, scores in zip(cuts, ours.scores(cuts, range(3)), strict=True):
        assert objective.value(scores.tolist()) == pytest.approx(plain_loss(model, cut.active, SAMPLES), rel=1e-5)


def test_a_score_depends_on_nothing_else_that_is_asked(supernet: Supernet, tmp_path: Path) -> None:
    """Bit for bit: alone or together, from stored states or from the embedding, resident or streamed, all states on
    disk or few."""
    cuts = random_cuts(10)
    _, together = scorer(supernet, tmp_path / "a")
    expected = together.scores(cuts, range(3))
    _, alone = scorer(supernet, tmp_path / "b", memory_bytes=1000, limit_bytes=1)
    from_start = LocalScorer(LayerStack(supernet, memory_bytes=RESIDENT), SAMPLES, "loss")
    for cut, scores in zip(cuts, expected, strict=True):
        for other in (alone, from_start):
            parts = [other.scores([cut], range(i, i + 1))[0] for i in range(3)]
            np.testing.assert_array_equal(np.concatenate(parts), scores)


def test_what_cuts_share_is_computed_once(supernet: Supernet, tmp_path: Path) -> None:
    stack, ours = scorer(supernet, tmp_path)
    ours.scores([KeptLayers((True,) * 6)], range(3))
    tokens = SAMPLES.num_tokens
    assert stack.work.layer_tokens == 6 * tokens  # the shared states
    stack.work.layer_tokens = 0
    # Layers 3, 4, 5 of the first; the second has 3 and 4 in common with it; the third parts at once.
    ours.scores(
        [
            KeptLayers((True, True, False, True, True, True)),
            KeptLayers((True, True, False, True, True, False)),
            KeptLayers((True, True, False, False, True, True)),
        ],
        range(3),
    )
    assert stack.work.layer_tokens == (3 + 0 + 2) * tokens


@pytest.mark.parametrize("limit_states", [1, 3, 4, 100])
def test_states_that_do_not_fit_are_computed_again(supernet: Supernet, tmp_path: Path, limit_states: int) -> None:
    """A search goes down through the boundaries: each missing one is computed once more, and the disk stays bounded."""
    stack = LayerStack(supernet, memory_bytes=RESIDENT)
    size_bytes = SAMPLES.num_tokens * 96 * 4
    states = StateStore(stack, SAMPLES, tmp_path, limit_bytes=limit_states * size_bytes)
    for _ in states.sweep():
        pass
    most = 0
    for boundary in range(6, -1, -1):
        states.prepare(boundary)
        assert states.nearest(boundary) == boundary
        most = max(most, sum(path.stat().st_size for path in tmp_path.iterdir()))
    seals_bytes = 4 * 512  # a digest beside the states of each file
    assert most <= max(limit_states, 4) * size_bytes + seals_bytes
    assert stack.work.layer_tokens <= 2 * 6 * SAMPLES.num_tokens
    if limit_states == 100:
        assert stack.work.layer_tokens == 6 * SAMPLES.num_tokens


def test_exact_search_is_the_plain_search_with_less_work(supernet: Supernet, tmp_path: Path) -> None:
    model = whole_model(supernet)
    plain_layers = []

    def plain(active: np.ndarray, bound: float | None = None) -> float:
        plain_layers.append(int(active.sum()))
        return plain_loss(model, active.tolist(), SAMPLES)

    expected = search_depth(plain, num_layers=6, max_removed=3, keep_last=1)
    stack, ours = scorer(supernet, tmp_path)
    with Ledger(ours, one_by_one(SAMPLES)) as ledger:
        judge = ExactJudge(ledger, Objective("loss", SAMPLES))
        one_by_one_found = search_depth(judge, num_layers=6, max_removed=3, keep_last=1)
    stack.work.layer_tokens = 0
    with Ledger(ours, one_by_one(SAMPLES)) as ledger:
        judge = ExactJudge(ledger, Objective("loss", SAMPLES))
        found = fill_table(judge.judge, num_layers=6, max_removed=3, keep_last=1)
    for removed, active in expected.active.items():
        np.testing.assert_array_equal(found[removed].active, active)
        np.testing.assert_array_equal(one_by_one_found.active[removed], active)
        assert found[removed].metric == one_by_one_found.metric[removed]
        assert found[removed].metric == pytest.approx(expected.metric[removed], rel=1e-5)
    assert stack.work.layer_tokens < 0.6 * sum(plain_layers) * SAMPLES.num_tokens


def test_a_lost_candidate_stops_early(supernet: Supernet, tmp_path: Path) -> None:
    stack, ours = scorer(supernet, tmp_path)
    objective = Objective("loss", SAMPLES)
    active = np.array([True, True, False, True, True, True])
    with Ledger(ours, one_by_one(SAMPLES)) as ledger:
        judge = ExactJudge(ledger, objective)
        assert judge(active, bound=0.01) >= 0.01
        assert stack.work.head_logits == 128 * SAMPLES.num_scored // 3
        metric = judge(active)
        assert judge(active, bound=metric) == metric
        assert judge(active, bound=metric + 1e-9) == metric
    assert stack.work.head_logits == 128 * SAMPLES.num_scored


def choices() -> Samples:
    """Two questions, one with a choice fewer, the right answers being whatever token 5 and 6 are."""
    return Samples(
        (
            Batch(
                tokens_BT=torch.tensor([[9, 10, 3], [11, 3, 0]]),
                lengths_B=torch.tensor([3, 2]),
                rows_S=torch.arange(2),
                positions_S=torch.tensor([2, 1]),
                targets_S=torch.tensor([5, 6]),
                segments_S=torch.arange(2),
                choices_SC=torch.tensor([[4, 5, 6], [6, 5, -1]]),
            ),
        )
    )


@torch.no_grad()
def test_accuracy_looks_at_the_answer_token_alone(supernet: Supernet) -> None:
    samples, stack = choices(), LayerStack(supernet, memory_bytes=RESIDENT)
    found = LocalScorer(stack, samples, "accuracy").scores([KeptLayers((True,) * 6)], range(1))[0]
    model = whole_model(supernet)
    right = []
    for tokens, letters, target in (([9, 10, 3], [4, 5, 6], 5), ([11, 3], [6, 5], 6)):
        logits_V = model(torch.tensor([tokens])).logits[0, -1]
        right.append(float(letters[int(logits_V[letters].argmax())] == target))
    assert found.tolist() == right
    assert stack.work.head_logits == 2 * 3


def test_accuracy_is_lost_when_right_answers_would_not_do() -> None:
    objective = Objective("accuracy", choices())
    assert objective.mode == "max"
    assert objective.at_best([]) == 1.0
    assert objective.at_best([0.0]) == 0.5
    assert objective.value([0.0, 1.0]) == 0.5


def test_perplexity_is_the_exponential_of_the_loss(supernet: Supernet) -> None:
    scores = LocalScorer(LayerStack(supernet, memory_bytes=RESIDENT), SAMPLES, "perplexity").scores(
        [KeptLayers((True,) * 6)], range(3)
    )[0]
    loss = Objective("loss", SAMPLES).value(scores.tolist())
    assert Objective("perplexity", SAMPLES).value(scores.tolist()) == pytest.approx(np.exp(loss))


def test_a_vocabulary_in_blocks(supernet: Supernet, monkeypatch: pytest.MonkeyPatch) -> None:
    stack, cuts = LayerStack(supernet, memory_bytes=RESIDENT), [KeptLayers((True,) * 6)]
    whole = LocalScorer(stack, SAMPLES, "loss").scores(cuts, range(3))[0]
    monkeypatch.setattr("amoeba_export.model.head.MIN_BLOCK", 7)
    monkeypatch.setattr("amoeba_export.model.head.LOGIT_BYTES", 1)
    blocks = LocalScorer(stack, SAMPLES, "loss").scores(cuts, range(3))[0]
    np.testing.assert_allclose(blocks, whole, rtol=1e-5)


class _Broken:
    def scores(self, cuts, batches):
        return [np.array([1.0, np.nan]) for _ in cuts]


def test_nan_names_the_layers() -> None:
    with Ledger(_Broken(), all_at_once(SAMPLES)) as ledger, pytest.raises(NotANumber) as caught:
        ExactJudge(ledger, Objective("perplexity", SAMPLES))(np.array([True, False, True, False]))
    assert caught.value.what == "The perplexity of the model without layers 1, 3 is not a number."
    assert caught.value.exit_code == 3


def test_the_ledger_forgets_only_the_unfinished_line(tmp_path: Path) -> None:
    calls = []

    class Counting:
        def scores(self, cuts, batches):
            calls.append((len(cuts), batches))
            return [np.array([1 / 3 + len(calls)]) for _ in cuts]

    path = tmp_path / "scores.jsonl"
    cuts = random_cuts(2)
    with Ledger(Counting(), one_by_one(SAMPLES), path) as ledger:
        first = ledger.all(cuts)
    content = path.read_bytes()
    path.write_bytes(content[:-5])
    with Ledger(Counting(), one_by_one(SAMPLES), path) as ledger:
        again = ledger.all(cuts)
        assert calls == [(2, range(i, i + 1)) for i in range(3)] + [(1, range(2, 3))]
        np.testing.assert_array_equal(again[0], first[0])
    assert path.read_bytes().startswith(content[: content[:-1].rfind(b"\n")])
