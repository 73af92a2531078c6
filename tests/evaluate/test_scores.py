"""Scores against direct computations, and against lm-eval on the same items."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.nn import functional
from transformers import PreTrainedTokenizerFast

from amoeba_export.errors import AmoebaError, BadRecord, InputError, NotFound, UnknownName, UnsupportedError
from amoeba_export.evaluate import (
    ArtifactModel,
    Harness,
    measure_perplexity,
    perplexity,
    read_tasks,
    read_windows,
    score_task,
    task_names,
)
from amoeba_export.evaluate.likelihood import log_likelihoods
from amoeba_export.locations import data_dir
from amoeba_export.model.data import DataRecipe, read_questions
from tests.finetune.models import char_tokenizer
from tests.formats.bpe import save_bpe
from tests.tiny import tiny_model


class Stock:
    """A transformers model, run on padded rows."""

    def __init__(self) -> None:
        self.model = tiny_model("llama", seed=1)
        self.rows = 0

    @torch.no_grad()
    def logits(self, input_ids_BT: torch.Tensor, select_BT: torch.Tensor) -> torch.Tensor:
        self.rows += len(input_ids_BT)
        return self.model(input_ids_BT).logits[select_BT]


class Opened:
    """The same behind the interface of an opened artifact: one row at a time."""

    def __init__(self, stock: Stock) -> None:
        self.stock = stock

    @torch.no_grad()
    def logits(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.stock.model(input_ids).logits


@pytest.fixture(scope="module")
def stock() -> Stock:
    return Stock()


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerFast:
    return char_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def write(path: Path, *records: object) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


ITEMS = [
    {"context": f"{word}:", "choices": [word, word[::-1] + "s", "zz"], "answer": i % 3}
    for i, word in enumerate(["tree", "river", "a long stone", "cloud", "ember", "fog", "moss", "sand"])
]


def test_perplexity_is_exp_of_the_mean_loss_over_whole_windows(
    stock: Stock, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    path = tmp_path / "text.txt"
    path.write_text("The quick brown fox jumps over the lazy dog. " * 3)
    windows = read_windows(path, tokenizer, window=32)
    assert len(windows) == (1 + 45 * 3) // 32
    assert windows[0][0] == tokenizer.bos_token_id
    score = measure_perplexity(stock, windows, batch_tokens=70)
    losses = []
    for window in windows:
        ids = torch.tensor([window])
        losses.append(functional.cross_entropy(stock.model(ids).logits[0, :-1], ids[0, 1:]).item())
    assert score.loss == pytest.approx(sum(losses) / len(losses), abs=1e-6)
    assert score.perplexity == pytest.approx(math.exp(score.loss))
    assert score.num_tokens == 31 * len(windows)
    assert len(read_windows(path, tokenizer, window=32, limit=2)) == 2


@pytest.mark.parametrize("chars_per_token", [1, 4])
def test_the_first_windows_are_those_of_the_whole_text(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chars_per_token: int
) -> None:
    """Also where a beginning turns out too short, and where the text has fewer."""
    monkeypatch.setattr(perplexity, "_CHARS_PER_TOKEN", chars_per_token)
    path = tmp_path / "text.txt"
    path.write_text((data_dir("calibration") / "wikitext2/wikitext2.txt").read_text()[:8000])
    save_bpe(tmp_path)
    for found in (tokenizer, PreTrainedTokenizerFast.from_pretrained(tmp_path)):
        everything = read_windows(path, found, window=48)
        for limit in (1, 8, 40, len(everything), 1000):
            assert read_windows(path, found, window=48, limit=limit) == everything[:limit]


def test_likelihoods_come_back_in_order_whatever_runs_together(stock: Stock) -> None:
    rows = [[5, 6, 7], [5, 6, 8], [9, 10, 11, 12, 13, 14], [5, 6, 7, 9]]
    starts = [2, 2, 1, 1]
    apart = [log_likelihoods(stock, [row], [start])[0] for row, start in zip(rows, starts, strict=True)]
    for batch_tokens in (1, 8, 1000):
        together = log_likelihoods(stock, rows, starts, batch_tokens=batch_tokens)
        assert [s.log_prob for s in together] == pytest.approx([s.log_prob for s in apart], abs=1e-5)
        assert [s.is_greedy for s in together] == [s.is_greedy for s in apart]


def test_choices_of_one_letter_run_once(stock: Stock, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    path = write(tmp_path / "mmlu.jsonl", {"question": "2 + 2?", "choices": ["1", "4", "5", "7"], "answer": 1})
    (task,) = read_tasks(path)
    assert task.items[0].prompt == "2 + 2?\nA. 1\nB. 4\nC. 5\nD. 7\nAnswer:"
    assert task.items[0].choices == ("A", "B", "C", "D")
    before = stock.rows
    score_task(stock, task, tokenizer)
    assert stock.rows == before + 1


@pytest.mark.parametrize("wrap", [lambda stock: stock, lambda stock: ArtifactModel(Opened(stock))], ids=["rows", "one"])
def test_accuracies_are_those_of_lm_eval(
    stock: Stock,
    tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    wrap: Callable[[Stock], Stock],
) -> None:
    pytest.importorskip("lm_eval")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    data = write(tmp_path / "items.jsonl", *ITEMS)
    (tmp_path / "words.yaml").write_text(
        "task: words\n"
        "dataset_path: json\n"
        f"dataset_kwargs: {{data_files: {{test: {data}}}}}\n"
        "test_split: test\n"
        "output_type: multiple_choice\n"
        'doc_to_text: "{{context}}"\n'
        'doc_to_choice: "{{choices}}"\n'
        "doc_to_target: answer\n"
        "metric_list: [{metric: acc}, {metric: acc_norm}]\n"
    )
    model = wrap(stock)
    theirs = Harness.open(["words"], folder=tmp_path).score(model, tokenizer, max_length=200)["words"]
    ours = score_task(model, read_tasks(data)[0], tokenizer)
    assert (ours.accuracy, ours.accuracy_norm) == (theirs.accuracy, theirs.accuracy_norm)
    assert 0 < ours.accuracy_norm < 1
    assert ours.num_items == theirs.num_items == 8
    assert ours.stderr == pytest.approx(theirs.stderr)


def test_lm_eval_is_asked_only_for_what_it_knows(tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    with pytest.raises(UnknownName) as caught:
        Harness.open(["hellaswagg"])
    assert caught.value.what == "There is no task named 'hellaswagg'. Did you mean 'hellaswag'?"


def test_a_task_that_generates_is_refused(
    stock: Stock, tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("lm_eval")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    data = write(tmp_path / "items.jsonl", *ITEMS)
    (tmp_path / "say.yaml").write_text(
        "task: say\ndataset_path: json\n"
        f"dataset_kwargs: {{data_files: {{test: {data}}}}}\n"
        "test_split: test\noutput_type: generate_until\n"
        'doc_to_text: "{{context}}"\ndoc_to_target: "x"\nmetric_list: [{metric: exact_match}]\n'
    )
    with pytest.raises(UnsupportedError, match="This task lets the model write"):
        Harness.open(["say"], folder=tmp_path).score(stock, tokenizer, max_length=200)


def test_a_file_of_tasks_says_how_to_ask(stock: Stock, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", *ITEMS)
    (tmp_path / "tasks.toml").write_text(
        '[[task]]\nname = "first"\nfile = "a.jsonl"\nprompt = "Q: {context}\\nA:"\nmetric = "accuracy_norm"\n'
        '[[task]]\nfile = "a.jsonl"\nstyle = "lettered"\n'
    )
    first, second = read_tasks(tmp_path / "tasks.toml", limit=5, seed=1)
    assert task_names([first, second]) == ("first", "a")
    assert (len(first.items), len(second.items)) == (5, 5)
    assert first.items[0].prompt.startswith("Q: ")
    assert first.items[0].prompt.endswith(":\nA:")
    assert second.items[0].prompt.endswith("\nC. zz\nAnswer:")
    score = score_task(stock, first, tokenizer)
    assert score.score == score.accuracy_norm
    with pytest.raises(InputError, match="There are two tasks named 'a'"):
        task_names([second, second])


def test_a_limit_draws_from_all_of_the_file_and_always_the_same(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", *[{**ITEMS[0], "context": str(i)} for i in range(100)])
    drawn = [int(item.prompt) for item in read_tasks(path, limit=10)[0].items]
    assert drawn == sorted(set(drawn)) == [int(item.prompt) for item in read_tasks(path, limit=10)[0].items]
    assert max(drawn) > 50


def test_a_question_is_asked_as_calibration_asks_it(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", {"question": "Which?", "choices": ["b", "c", "d"], "answer": 1})
    (item,) = read_tasks(path)[0].items
    (question,) = read_questions(DataRecipe(file=str(path), kind="choices"))
    assert item.prompt == question.prompt == "Which?\nA. b\nB. c\nC. d\nAnswer:"
    assert (item.choices, item.answer) == (("A", "B", "C"), question.answer)


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"context": 3}, "Line 2 of the task has a field 'context' that is not text."),
        ({"context": "a"}, "Line 2 of the task has no field 'choices'; it has 'context'."),
        ({"context": "a", "choices": ["b"]}, "Line 2 of the task has 1 choices; 2 to 26 can be asked."),
        (
            {"context": "a", "choices": ["b", "c"], "answer": 2},
            "Line 2 of the task has the answer 2, which is no position in its choices.",
        ),
    ],
)
def test_a_bad_item_is_named_by_its_line(tmp_path: Path, record: object, message: str) -> None:
    with pytest.raises(BadRecord) as caught:
        read_tasks(write(tmp_path / "a.jsonl", ITEMS[0], record))
    assert caught.value.what == message


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("x", "This file is damaged or not what its name says: it is not TOML ("),
        ("x = 1", "This is not a task file: it has no [[task]]."),
        ("[[task]]\nfil = 'a'", "This is not a task file: task 1 has a key 'fil'; it can have name, file"),
        ("[[task]]\nname = 'a'", "This is not a task file: task 1 names no file."),
        (
            "[[task]]\nfile = 'a.jsonl'\nmetric = 'f1'",
            "This is not a task file: task 1 has the metric 'f1'; it can be accuracy or accuracy_norm.",
        ),
        ("[[task]]\nfile = 'absent.jsonl'", "The task was not found: "),
    ],
)
def test_a_bad_file_of_tasks_is_explained(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "tasks.toml").write_text(content)
    with pytest.raises(AmoebaError) as caught:
        read_tasks(tmp_path / "tasks.toml")
    assert caught.value.what.startswith(message)


def test_a_text_that_is_too_short_is_refused(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_text("short")
    with pytest.raises(InputError) as caught:
        read_windows(tmp_path / "t.txt", tokenizer, window=64)
    assert caught.value.what == "The evaluation text has 6 tokens, fewer than one window of 64."
    with pytest.raises(NotFound):
        read_windows(tmp_path / "absent.txt", tokenizer, window=64)
