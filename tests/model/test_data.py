from __future__ import annotations

import json
import random
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from amoeba_export.errors import InputError
from amoeba_export.ir import Supernet
from amoeba_export.model.data import DataRecipe
from amoeba_export.model.samples import (
    Samples,
    choice_samples,
    opening_of,
    read_samples,
    text_batches,
    text_samples,
    windows_of,
)
from amoeba_export.reading.questions import MultipleChoice
from tests.model.models import WORDS, random_text

Write = Callable[[str, bytes], DataRecipe]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def make(name: str, content: bytes, **settings: object) -> DataRecipe:
        path = tmp_path / name
        path.write_bytes(content)
        return DataRecipe.model_validate({"file": str(path), "window": 8, "samples": 2, "heldout": 1} | settings)

    return make


def words(samples: Samples) -> list[list[str]]:
    return [[WORDS[i] for i in row] for batch in samples.batches for row in batch.tokens_BT.tolist()]


def test_windows_do_not_overlap_and_held_out_ones_are_others(write: Write, supernet: Supernet) -> None:
    text = " ".join(WORDS[9:105])
    recipe = write("text.txt", text.encode(), samples=6, heldout=6)
    search, heldout = read_samples(recipe, supernet.folder, seed=0)
    windows = [tuple(window) for window in words(search) + words(heldout)]
    assert sorted(word for window in windows for word in window) == sorted(WORDS[9:105])
    assert all(" ".join(window) in text for window in windows)
    again, _ = read_samples(recipe, supernet.folder, seed=0)
    other, _ = read_samples(recipe, supernet.folder, seed=1)
    assert search.digest == again.digest != other.digest


def test_only_the_last_tokens_are_scored() -> None:
    batch = text_batches([list(range(40)), list(range(40, 80))], 2, scored=20)[0]
    assert batch.positions_S.tolist() == [*range(19, 39)] * 2
    assert batch.targets_S.tolist() == [*range(20, 40), *range(60, 80)]
    assert batch.segments_S.tolist() == [0] * 16 + [1] * 4 + [2] * 16 + [3] * 4
    whole = text_batches([list(range(8))], 2)[0]
    assert whole.positions_S.tolist() == [*range(7)]


def test_documents_of_a_jsonl_file_are_joined_by_end_tokens(write: Write, supernet: Supernet) -> None:
    records = [{"a": "w1 w2", "b": "w3"}, {"a": "w4", "b": ""}]
    content = "\n\n".join(json.dumps(record) for record in records).encode()
    recipe = write("text.jsonl", content, fields=("a", "b"), window=5, samples=1, heldout=0)
    search, _ = read_samples(recipe, supernet.folder, seed=0)
    assert words(search) == [["w1", "w2", "w3", "</s>", "w4"]]


def test_a_question_is_asked_as_in_mmlu(supernet: Supernet) -> None:
    question = MultipleChoice("w5 ?", ("w1", "w2", "w3"), 2)
    assert question.prompt == "w5 ?\nA. w1\nB. w2\nC. w3\nAnswer:"
    tokenizer = AutoTokenizer.from_pretrained(supernet.folder)
    recipe = DataRecipe(file="x", kind="choices", window=40, samples=1, heldout=1, batch=2)
    short = MultipleChoice("w5", ("w1", "w2"), 0)
    search, heldout = choice_samples([question, short], tokenizer, recipe, random.Random(0))
    found = sorted((*search.batches, *heldout.batches), key=lambda batch: batch.tokens_BT.shape[1])
    assert [WORDS[batch.targets_S[0]] for batch in found] == ["A", "C"]
    assert found[1].choices_SC is not None
    assert [WORDS[i] for i in found[1].choices_SC[0]] == ["A", "B", "C"]
    assert found[0].choices_SC is not None
    assert found[0].choices_SC[0, 2] == -1
    assert WORDS[found[0].tokens_BT[0, found[0].positions_S[0]]] == "Answer:"


def test_padding_comes_last(supernet: Supernet) -> None:
    tokenizer = AutoTokenizer.from_pretrained(supernet.folder)
    questions = [MultipleChoice("w5 w6 w7", ("w1", "w2"), 0), MultipleChoice("w5", ("w1", "w2"), 1)]
    recipe = DataRecipe(file="x", kind="choices", window=40, samples=2, heldout=0, batch=2)
    batch = choice_samples(questions, tokenizer, recipe, random.Random(0))[0].batches[0]
    assert sorted(batch.lengths_B.tolist()) == [6, 8]
    assert torch.equal(batch.positions_S, batch.lengths_B - 1)


LICENCE = b'{"question": "w1", "choices": ["w2", "w3"], "answer": 0}\n'

ERRORS = {
    "empty": ("a.txt", b" \n", {}, "The calibration data is empty.", "{path}", "Give a file with text in it."),
    "empty records": (
        "a.jsonl",
        b'\n{"text": ""}',
        {},
        "The calibration data is empty.",
        "{path}",
        "Give a file with text in it.",
    ),
    "short": (
        "a.txt",
        b"w1 w2 w3",
        {},
        "The calibration data is too small: it has 3 tokens, and the recipe takes 3 windows of 8 tokens, 24 in all.",
        "{path}",
        "Give more data, or a recipe with fewer samples or a shorter window.",
    ),
    "one document": (
        "a.txt",
        random_text(20).encode(),
        {},
        "The calibration data is too small: it has 20 tokens, and the recipe takes 3 windows of 8 tokens, 24 in all.",
        "{path}",
        "Give more data, or a recipe with fewer samples or a shorter window.",
    ),
    "binary": (
        "a.txt",
        b"abc\xff\xfe",
        {},
        "The calibration data is not UTF-8 text: byte 3 cannot be read.",
        "{path}",
        "Give a text file, a JSONL file, or the id of a data set.",
    ),
    "binary with zeros": (
        "a.jsonl",
        b"\x08\x00\x00\x00{}",
        {},
        "The calibration data is not UTF-8 text: byte 1 cannot be read.",
        "{path}",
        "Give a text file, a JSONL file, or the id of a data set.",
    ),
    "field": (
        "a.jsonl",
        b'{"text": "w1"}\n{"body": "w1", "id": "3"}',
        {},
        "Line 2 of the calibration data has no field 'text'; it has 'body', 'id'.",
        "{path}:2",
        "Correct the line, or name the right fields in the recipe.",
    ),
    "not text in a field": (
        "a.jsonl",
        b'{"text": 3}',
        {},
        "Line 1 of the calibration data has a field 'text' that is not text.",
        "{path}:1",
        "Correct the line, or name the right fields in the recipe.",
    ),
    "not JSON": (
        "a.jsonl",
        b"w1 w2",
        {},
        "Line 1 of the calibration data is not JSON (Expecting value: line 1 column 1 (char 0)).",
        "{path}:1",
        "Correct the line, or name the right fields in the recipe.",
    ),
    "no object": (
        "a.jsonl",
        b"[1]",
        {},
        "Line 1 of the calibration data is not a JSON object.",
        "{path}:1",
        "Correct the line, or name the right fields in the recipe.",
    ),
    "no choices": (
        "a.jsonl",
        b'{"question": "w1", "answer": 0}',
        {"kind": "choices"},
        "Line 1 of the calibration data has no field 'choices'; it has 'question', 'answer'.",
        "{path}:1",
        "Correct the line, or name the right fields in the recipe.",
    ),
    "bad answer": (
        "a.jsonl",
        LICENCE + b'{"context": "w1", "choices": ["w2", "w3"], "answer": 2}',
        {"kind": "choices"},
        "Line 2 of the calibration data has the answer 2, which is no position in its choices.",
        "{path}:2",
        "Correct the line, or name the right fields in the recipe.",
    ),
    "bad choices": (
        "a.jsonl",
        b'{"question": "w1", "choices": "w2", "answer": 0}',
        {"kind": "choices"},
        "Line 1 of the calibration data has a field 'choices' that is not a list of texts.",
        "{path}:1",
        "Correct the line, or name the right fields in the recipe.",
    ),
    "one choice": (
        "a.jsonl",
        b'{"question": "w1", "choices": ["w2"], "answer": 0}',
        {"kind": "choices"},
        "Line 1 of the calibration data has 1 choices; 2 to 26 can be asked.",
        "{path}:1",
        "Correct the line, or name the right fields in the recipe.",
    ),
    "few questions": (
        "a.jsonl",
        LICENCE * 2,
        {"kind": "choices"},
        "The calibration data is too small: it has 2 questions of at most 8 tokens (2 in all), and the recipe takes 3.",
        "{path}",
        "Give more data, or a recipe with fewer samples or a shorter window.",
    ),
}


@pytest.mark.parametrize("case", ERRORS)
def test_data_that_cannot_be_used(write: Write, supernet: Supernet, case: str) -> None:
    name, content, settings, what, where, next_step = ERRORS[case]
    recipe = write(name, content, **settings)
    with pytest.raises(InputError) as caught:
        read_samples(recipe, supernet.folder, seed=0)
    assert caught.value.exit_code == 3
    where = where.format(path=recipe.file)
    assert str(caught.value) == f"{what}\n  where: {where}\n  next:  {next_step}"


def test_a_file_that_is_not_there(supernet: Supernet, tmp_path: Path) -> None:
    with pytest.raises(InputError) as caught:
        read_samples(DataRecipe(file=str(tmp_path / "no.txt")), supernet.folder, seed=0)
    assert caught.value.what == f"The calibration data was not found: {tmp_path / 'no.txt'}"


def test_a_model_without_a_tokenizer(write: Write, tmp_path: Path) -> None:
    folder = tmp_path / "empty"
    folder.mkdir()
    with pytest.raises(InputError) as caught:
        read_samples(write("a.txt", random_text(50).encode()), folder, seed=0)
    assert caught.value.what.startswith("The model has no tokenizer that can be read: ")
    assert caught.value.next_step == "Put the tokenizer files of the model into its folder."


def test_a_hub_data_set_is_streamed(supernet: Supernet, tmp_path: Path) -> None:
    """`datasets` takes a local folder where a hub id goes; the code path is the same."""
    pytest.importorskip("datasets")
    (tmp_path / "train.jsonl").write_text(json.dumps({"text": random_text(60)}))
    recipe = DataRecipe(hub=str(tmp_path), window=8, samples=2, heldout=1)
    search, heldout = read_samples(recipe, supernet.folder, seed=0)
    assert (search.num_samples, heldout.num_samples) == (2, 1)


def test_a_hub_data_set_that_cannot_be_had(supernet: Supernet, tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    with pytest.raises(InputError) as caught:
        read_samples(DataRecipe(hub=str(tmp_path / "none")), supernet.folder, seed=0)
    assert caught.value.what.startswith(f"The data set '{tmp_path / 'none'}' cannot be read: ")
    assert caught.value.exit_code == 3


def test_hub_data_without_the_extra(supernet: Supernet, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(InputError) as caught:
        read_samples(DataRecipe(hub="some/set"), supernet.folder, seed=0)
    assert str(caught.value) == (
        "The data set 'some/set' needs the package datasets, which is not installed.\n"
        "  next:  Install it with: pip install 'amoeba-export[data]', or give a file."
    )


class Opening:
    """A tokenizer of one character a token that opens a text with 1, and may close it with 2."""

    eos_token_id: int | None = 2
    unk_token_id: int | None = None

    def __init__(self, opening: list[int], closing: list[int]) -> None:
        self._opening, self._closing = opening, closing

    def encode(self, text: str, *, add_special_tokens: bool, verbose: bool = True) -> list[int]:
        ids = [ord(letter) for letter in text]
        return [*self._opening, *ids, *self._closing] if add_special_tokens else ids


@pytest.mark.parametrize("closing", [[], [2]])
def test_every_window_opens_as_the_tokenizer_opens_a_text(write: Write, closing: list[int]) -> None:
    recipe = write("text.txt", b"", samples=3, heldout=1)
    text = "abcdefghijklmnopqrstuvwxyz012"
    search, heldout = text_samples([text], Opening([1], closing), recipe, random.Random(0))
    windows = [row for batch in (*search.batches, *heldout.batches) for row in batch.tokens_BT.tolist()]
    assert all(row[0] == 1 and len(row) == 8 for row in windows)
    assert sorted("".join(map(chr, row[1:])) for row in windows) == sorted(text[i : i + 7] for i in (0, 7, 14, 21))


def test_a_tokenizer_that_opens_nothing_changes_no_window() -> None:
    assert opening_of(Opening([], [2])) == []
    assert opening_of(Opening([1, 5], [])) == [1, 5]
    assert windows_of(range(9), 4) == [[0, 1, 2, 3], [4, 5, 6, 7]]
