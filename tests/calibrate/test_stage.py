from __future__ import annotations

import dataclasses
import json
import signal
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import PreTrainedTokenizerFast

from amoeba_export.cache.kinds import CALIBRATION
from amoeba_export.calibrate import Recipe, calibrate
from amoeba_export.calibrate.evaluator import LocalScorer
from amoeba_export.errors import InputError, NotANumber
from amoeba_export.ir import Shape, Strategy, Supernet, validate
from amoeba_export.ir.derive import CutRules, derive_plan
from amoeba_export.model.layers import LayerStack
from amoeba_export.model.samples import read_samples
from amoeba_export.model.states import StateStore
from tests.listener import Listener, flip_bit
from tests.model.models import WORDS, plain_loss, random_text, tiny_supernet, whole_model
from tests.tiny import FAMILIES


def recipe(file: Path, **tables: object) -> Recipe:
    data = {"file": str(file), "window": 16, "samples": 6, "heldout": 4, "batch": 2}
    return Recipe.model_validate(
        {"name": "test", "data": data | tables.pop("data", {}), "depth": {"max_removed": 0.5}} | tables  # type: ignore[operator]
    )


def assert_same(first: Strategy, second: Strategy) -> None:
    assert dataclasses.replace(first, importance=None) == dataclasses.replace(second, importance=None)
    assert first.importance is not None
    assert second.importance is not None
    for field in ("heads_LN", "ffn_LF", "o_mean_LQ", "down_mean_LF"):
        np.testing.assert_array_equal(getattr(first.importance, field), getattr(second.importance, field))


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_calibrates_and_every_plan_is_valid(
    tmp_path: Path, text_file: Path, family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # AutoTokenizer would read our words as byte pairs because of the model type qwen2.
    monkeypatch.setattr("amoeba_export.model.samples.open_tokenizer", PreTrainedTokenizerFast.from_pretrained)
    supernet = tiny_supernet(tmp_path / "model", family)
    strategy = calibrate(supernet, recipe(text_file, quality={"widths": [1.0, 0.5]}))
    assert sorted(strategy.depth) == sorted(strategy.depth_metric) == [0, 1, 2]
    assert strategy.depth[0] == (1,) * 4
    assert [sum(strategy.depth[m]) for m in range(3)] == [4, 3, 2]
    assert strategy.quality.keys() == {Shape(depth, width) for depth in (4, 3, 2) for width in (1.0, 0.5)}
    assert strategy.model_id == supernet.identity
    for policy in ("uniform", "adaptive"):
        for unit in ("kv_group", "query_per_group"):
            for depth in (4, 2):
                for width in (1.0, 0.8, 0.33):
                    rules = CutRules(policy=policy, unit=unit)
                    plan = derive_plan(strategy, supernet.architecture, Shape(depth, width), rules)
                    validate(plan, supernet.architecture)


def test_metrics_are_those_of_the_whole_model(supernet: Supernet, text_file: Path) -> None:
    made = recipe(text_file, quality={"widths": [1.0, 0.75]}, depth={"max_removed": 3, "metric": "perplexity"})
    strategy = calibrate(supernet, made, seed=3)
    search, heldout = read_samples(made.data, supernet.folder, seed=3)
    model = whole_model(supernet)
    for removed, active in strategy.depth.items():
        kept = list(map(bool, active))
        assert strategy.depth_metric[removed] == pytest.approx(np.exp(plain_loss(model, kept, search)), rel=1e-5)
        assert strategy.quality[Shape(6 - removed, 1.0)] == pytest.approx(plain_loss(model, kept, heldout), rel=1e-5)


@torch.no_grad()
def test_quality_of_a_width_is_that_of_the_masked_model(supernet: Supernet, text_file: Path) -> None:
    """Removed inputs of o_proj and down_proj are replaced by their mean: what compensation stands for."""
    made = recipe(text_file, quality={"widths": [0.5]})
    strategy = calibrate(supernet, made)
    assert strategy.importance is not None
    _, heldout = read_samples(made.data, supernet.folder, seed=0)
    plan = derive_plan(strategy, supernet.architecture, Shape(6, 0.5))
    model, head_dim = whole_model(supernet), supernet.architecture.head_dim
    for layer in plan.layers:
        block, i = model.model.layers[layer.source_layer], layer.source_layer
        kept_Q = [head * head_dim + c for head in layer.query_heads for c in range(head_dim)]
        for module, kept, mean in (
            (block.self_attn.o_proj, kept_Q, strategy.importance.o_mean_LQ[i]),
            (block.mlp.down_proj, list(layer.ffn), strategy.importance.down_mean_LF[i]),
        ):
            gone = torch.ones(module.in_features, dtype=torch.bool)
            gone[kept] = False
            mean_I = torch.tensor(mean)
            module.register_forward_pre_hook(
                lambda _, inputs, gone=gone, mean_I=mean_I: (torch.where(gone, mean_I, inputs[0]),)
            )
    for removed in (0, 3):
        kept_layers = list(map(bool, strategy.depth[removed]))
        expected = plain_loss(model, kept_layers, heldout)
        assert strategy.quality[Shape(6 - removed, 0.5)] == pytest.approx(expected, rel=1e-5)


def test_same_seed_same_strategy(supernet: Supernet, text_file: Path) -> None:
    made = recipe(text_file)
    first = calibrate(supernet, made, seed=1)
    assert_same(first, calibrate(supernet, made, seed=1))
    assert_same(first, calibrate(supernet, made.model_copy(update={"memory_mb": 0, "states_mb": 0}), seed=1))
    assert calibrate(supernet, made, seed=2).depth_metric != first.depth_metric


def test_beam_and_racing(supernet: Supernet, text_file: Path) -> None:
    narrow, wide, racing = (
        calibrate(supernet, recipe(text_file, depth={"max_removed": 4, **depth}))
        for depth in ({}, {"beam": 4}, {"mode": "racing"})
    )
    for removed in range(1, 5):
        assert wide.depth_metric[removed] <= narrow.depth_metric[removed]
        assert racing.depth_metric[removed] < 1.1 * narrow.depth_metric[removed]


def test_multiple_choice_accuracy(supernet: Supernet, tmp_path: Path, text_file: Path) -> None:
    items = [
        {
            "question": random_text(3, seed=i),
            "choices": [random_text(1, seed=i + j) for j in range(2 + i % 3)],
            "answer": i % 2,
        }
        for i in range(40)
    ]
    path = tmp_path / "items.jsonl"
    path.write_text("\n".join(map(json.dumps, items)))
    made = recipe(
        path,
        data={"kind": "choices", "window": 32, "samples": 12, "heldout": 12},
        depth={"metric": "accuracy", "max_removed": 3},
        width={"data": {"file": str(text_file), "window": 16, "samples": 4, "heldout": 0}},
        quality={"metric": "accuracy", "policy": "adaptive", "widths": [1.0, 0.6]},
    )
    strategy = calibrate(supernet, made)
    assert (strategy.metric, strategy.quality_metric, strategy.policy) == ("accuracy", "accuracy", "adaptive")
    assert all(0 <= value <= 1 for value in (*strategy.depth_metric.values(), *strategy.quality.values()))
    assert all((value * 12) % 1 < 1e-9 or (value * 12) % 1 > 1 - 1e-9 for value in strategy.depth_metric.values())


CHILD = """
import os, signal, sys
from amoeba_export.calibrate import Recipe, calibrate
from amoeba_export.calibrate.evaluator import LocalScorer
from amoeba_export.load import load_supernet
from pathlib import Path

calls, scores = 0, LocalScorer.scores

def mortal(self, cuts, batches):
    global calls
    calls += 1
    if calls > int(sys.argv[4]):
        os.kill(os.getpid(), signal.SIGKILL)
    return scores(self, cuts, batches)

LocalScorer.scores = mortal
recipe = Recipe.model_validate_json(sys.argv[2])
calibrate(load_supernet(sys.argv[1]), recipe, cache_dir=Path(sys.argv[3]))
"""


def test_a_killed_run_goes_on_where_it_stopped(
    supernet: Supernet, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed with SIGKILL in the middle of the search: no layer and no candidate is computed again."""
    made, cache = recipe(text_file), tmp_path / "cache"
    scored: list[int] = []
    stacks: list[LayerStack] = []
    scores, make = LocalScorer.scores, LayerStack.__init__

    def counting(self, cuts, batches):
        scored.append(len(cuts) * len(batches))
        return scores(self, cuts, batches)

    def making(self, *args, **settings):
        stacks.append(self)
        make(self, *args, **settings)

    monkeypatch.setattr(LocalScorer, "scores", counting)
    monkeypatch.setattr(LayerStack, "__init__", making)
    expected = calibrate(supernet, made)
    whole, done = list(scored), 7
    scored.clear()
    child = subprocess.run(
        [sys.executable, "-c", CHILD, str(supernet.folder), made.model_dump_json(), str(cache), str(done)], check=False
    )
    assert child.returncode == -signal.SIGKILL
    assert_same(calibrate(supernet, made, cache_dir=cache), expected)
    assert scored == whole[done:]
    assert stacks[1].work.layer_tokens < stacks[0].work.layer_tokens - 6 * 96  # the states of the full model are there
    # And once more: all is known, nothing is computed.
    scored.clear()
    assert_same(calibrate(supernet, made, cache_dir=cache), expected)
    assert scored == []
    assert stacks[2].work.layer_tokens == 0
    assert not list(cache.rglob("*.f32"))


def test_a_model_that_gives_nan(tmp_path: Path, text_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    supernet = tiny_supernet(tmp_path / "model")
    monkeypatch.setattr(LayerStack, "norm", lambda self, hidden_TD: hidden_TD * torch.nan)
    with pytest.raises(NotANumber) as caught:
        calibrate(supernet, recipe(text_file))
    assert str(caught.value) == (
        "The loss of the model with all its layers is not a number.\n"
        "  next:  Check the model: run it on a sentence, or get its weights again."
    )
    assert caught.value.exit_code == 3


def test_progress_says_what_is_done(supernet: Supernet, text_file: Path) -> None:
    said: list[str] = []
    steps: dict[str, list[int]] = {}

    class Listener:
        def note(self, message: str) -> None:
            said.append(message)

        def warn(self, message: str) -> None:
            raise AssertionError(message)

        @contextmanager
        def track(self, description: str, total: int):
            steps[description] = [total, 0]

            def advance(count: int) -> None:
                steps[description][1] += count

            yield advance

    calibrate(supernet, recipe(text_file), seed=5, progress=Listener())
    assert said == [
        "Calibrating llama with recipe 'test', seed 5: 6 samples (96 tokens) for the search, 4 (64) held out"
    ]
    assert list(steps) == ["Measuring heads and neurons", "Searching layers", "Measuring shapes"]
    assert all(total == done for total, done in steps.values())


def test_too_many_layers_to_remove(supernet: Supernet, text_file: Path) -> None:
    with pytest.raises(Exception, match="6 layers cannot be removed from a model with 6 layers whose last 1 stay"):
        calibrate(supernet, recipe(text_file, depth={"max_removed": 6}))


def test_a_tokenizer_without_letters(supernet: Supernet, tmp_path: Path) -> None:
    path = tmp_path / "items.jsonl"
    path.write_text(json.dumps({"question": "w1", "choices": WORDS[9:15], "answer": 0}))
    with pytest.raises(InputError) as caught:
        calibrate(supernet, recipe(path, data={"kind": "choices"}))
    assert str(caught.value) == (
        "This model's tokenizer has no token of its own for the answer 'E'.\n"
        "  next:  Calibrate on text instead: data.kind = 'text' and metric = 'loss'."
    )


def test_damaged_work_of_an_earlier_run_is_done_again_with_a_note(
    supernet: Supernet, text_file: Path, tmp_path: Path
) -> None:
    """A flipped bit in a score, or in a layer's statistics, is neither believed nor fatal."""
    made, cache = recipe(text_file), tmp_path / "cache"
    expected = calibrate(supernet, made, cache_dir=cache)
    ledgers, layers = sorted(cache.rglob("*.jsonl")), sorted(cache.rglob("importance-*.sealed"))
    assert len(ledgers) == 2
    assert len(layers) == supernet.architecture.num_layers
    for path, position in ((ledgers[0], -4), (ledgers[0], 3), (ledgers[1], -4), (layers[1], -3), (layers[2], 5)):
        flip_bit(path, position)
        listener = Listener()
        assert_same(calibrate(supernet, made, cache_dir=cache, progress=listener), expected)
        (note,) = listener.told_of_damage()
        assert str(path) in note


def test_another_version_of_the_algorithm_finds_nothing(
    supernet: Supernet, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, cache = recipe(text_file), tmp_path / "cache"
    calibrate(supernet, made, cache_dir=cache)
    num_files = len(list(cache.rglob("importance-*.sealed")))
    newer = dataclasses.replace(CALIBRATION, made_by=(dataclasses.replace(CALIBRATION.made_by[0], version=99),))
    monkeypatch.setattr("amoeba_export.model.workplace.CALIBRATION", newer)
    calibrate(supernet, made, cache_dir=cache)
    assert len(list(cache.rglob("importance-*.sealed"))) == 2 * num_files


def test_damaged_states_are_computed_again_with_a_note(supernet: Supernet, text_file: Path, tmp_path: Path) -> None:
    samples, _ = read_samples(recipe(text_file).data, supernet.folder, seed=0)
    stack, folder = LayerStack(supernet, memory_bytes=10**9), tmp_path / "states"
    list(StateStore(stack, samples, folder, limit_bytes=10**9).sweep())
    expected = StateStore(stack, samples, folder, limit_bytes=10**9).read(3, 1)
    for name in ("boundary-0003.f32", "boundary-0003.sha256"):
        flip_bit(folder / name)
        listener = Listener()
        store = StateStore(stack, samples, folder, limit_bytes=10**9, progress=listener)
        store.prepare(3)
        assert listener.told_of_damage() == [f"{folder / 'boundary-0003.f32'} is damaged; it is computed again."]
        assert torch.equal(store.read(3, 1), expected)
