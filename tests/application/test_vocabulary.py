"""`--vocab-keep` on its way through an export: which tokens, what the manifest says, and what `verify` finds."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch
from tokenizers.pre_tokenizers import ByteLevel
from transformers import AutoModelForCausalLM

from amoeba_export import ExportRequest, export
from amoeba_export.application import request, vocabulary
from amoeba_export.application.card import artifact_page
from amoeba_export.application.evaluate import EvaluateRequest, evaluate
from amoeba_export.application.verify import verify
from amoeba_export.errors import (
    AmoebaError,
    BadValue,
    DamagedFile,
    InputError,
    NotAsWritten,
    NotFound,
    NotRepresentable,
    UsageError,
)
from amoeba_export.ir import SubnetPlan
from amoeba_export.load import load_supernet
from amoeba_export.model.samples import in_a_row
from amoeba_export.model.tokenizer import open_tokenizer
from amoeba_export.model.vocabulary import named_tokens, writable_tokens
from amoeba_export.quantities import percent
from amoeba_export.refit import load_refit_recipe
from tests.formats.bpe import save_bpe
from tests.tiny import VOCAB, save_tiny

SPECIAL = {0, 1, 2}


@pytest.fixture
def request_(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ExportRequest:
    monkeypatch.setenv("AMOEBA_CACHE", str(tmp_path / "cache"))
    recipe = load_refit_recipe("full")
    few = recipe.model_copy(update={"mix": recipe.mix[-1:]})
    for module in (request, vocabulary):
        monkeypatch.setattr(module, "load_refit_recipe", lambda name: few)
    model = save_tiny(tmp_path / "model")
    save_bpe(model)
    return ExportRequest(
        model=str(model), shape="4x1", formats=("onnx",), dtype="fp32", out=tmp_path / "out", vocab_keep="110"
    )


def kept(request: ExportRequest, vocab_keep: str | Path) -> tuple[int, ...]:
    result = export(dataclasses.replace(request, vocab_keep=str(vocab_keep), dry_run=True))
    assert result.plan.head_tokens is not None
    return result.plan.head_tokens


def always(request: ExportRequest) -> set[int]:
    folder = Path(request.model)
    return writable_tokens(open_tokenizer(folder)) | named_tokens(folder, {})


def test_tokens_that_every_text_can_be_written_with(request_: ExportRequest) -> None:
    tokenizer = open_tokenizer(Path(request_.model))
    words = tokenizer.get_vocab()
    ids = writable_tokens(tokenizer)
    # This vocabulary has not all 256 letters: pieces of one letter count.
    assert ids == {idx for word, idx in words.items() if len(word) == 1} | SPECIAL
    assert words["he"] not in ids


class Words:
    """A tokenizer's vocabulary alone."""

    all_special_ids = (0,)
    added_tokens_decoder = {7: "<tool>"}  # noqa: RUF012

    def __init__(self, words: list[str]) -> None:
        self._words = words

    def get_vocab(self) -> dict[str, int]:
        return {word: idx for idx, word in enumerate(self._words)}


def test_bytes_are_kept_and_letters_that_are_none_are_not() -> None:
    alphabet = sorted(ByteLevel.alphabet())
    assert writable_tokens(Words(["<s>", *alphabet, "he", "\u4e00"])) == {*range(257), 7}
    spelled = [f"<0x{value:02X}>" for value in range(256)]
    pieces = ["<unk>", *spelled, "\u2581", "a", "\u2581a", "\u4e00", "he"]
    assert writable_tokens(Words(pieces)) == {*range(258), 258}
    assert writable_tokens(Words(["<unk>", "\u4e00", "\u2581a", "ab"])) == {0, 1, 2, 7}


def test_a_number_is_the_size_of_the_head_and_its_tokens_are_the_most_frequent(request_: ExportRequest) -> None:
    needed = always(request_)
    many = kept(request_, str(len(needed) + 1))
    assert len(many) == len(needed) + 1
    # "he" is the one token of two letters, and no text has one of the names that fill the vocabulary up.
    assert set(many) - needed == {open_tokenizer(Path(request_.model)).get_vocab()["he"]}
    more = kept(request_, str(len(needed) + 4))
    unseen = [idx for idx in range(VOCAB) if idx not in many]
    assert set(more) - set(many) == set(unseen[:3])


def test_the_tokens_of_a_text(request_: ExportRequest, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("hehe")
    words = open_tokenizer(Path(request_.model)).get_vocab()
    assert set(kept(request_, tmp_path / "text.txt")) == always(request_) | {words["he"]}
    (tmp_path / "lines.jsonl").write_text(json.dumps({"text": "the"}) + "\n")
    assert set(kept(request_, tmp_path / "lines.jsonl")) == always(request_) | {words["he"]}


def test_a_list_of_ids(request_: ExportRequest, tmp_path: Path) -> None:
    (tmp_path / "ids.json").write_text("[120, 119, 120]")
    assert set(kept(request_, tmp_path / "ids.json")) == always(request_) | {119, 120}


def test_where_texts_end_is_kept_whoever_says_it(tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [5, 9], "pad_token_id": None}))
    assert named_tokens(tmp_path, {"bos_token_id": 1, "eos_token_id": 5}) == {1, 5, 9}


def refused(request: ExportRequest, vocab_keep: str | Path) -> AmoebaError:
    with pytest.raises(AmoebaError) as caught:
        export(dataclasses.replace(request, vocab_keep=str(vocab_keep)))
    assert not (request.out or Path()).exists()
    return caught.value


def test_what_names_no_tokens(request_: ExportRequest, tmp_path: Path) -> None:
    number = len(always(request_))
    few = refused(request_, "3")
    assert isinstance(few, BadValue)
    assert str(few) == (
        f"--vocab-keep cannot be '3'.\n  next:  Give at least {number}, which are always kept, and less than {VOCAB}."
    )
    assert isinstance(refused(request_, str(VOCAB)), BadValue)
    for text in ("0", "9" * 5000):
        assert isinstance(refused(request_, text), BadValue)
    assert isinstance(refused(request_, tmp_path / "nothing.txt"), NotFound)
    for text, words in (
        ("[1, 128]", "The model has no token 128: its ids are 0 to 127."),
        ("[-1]", "The model has no token -1: its ids are 0 to 127."),
        ('{"a": 1}', "This is not a list of token ids: it is {'a': 1}, not a list."),
        ('["a"]', "This is not a list of token ids"),
        ("[1, ", "This is not a list of token ids"),
        ('[1], "x": [2]', "This is not a list of token ids: it is more than that."),
    ):
        (tmp_path / "ids.json").write_text(text)
        error = refused(request_, tmp_path / "ids.json")
        assert isinstance(error, InputError)
        assert words in error.what
    (tmp_path / "ids.json").write_text(" ")
    assert isinstance(refused(request_, tmp_path / "ids.json"), InputError)


@pytest.mark.parametrize("container", ["gguf", "safetensors"])
def test_containers_that_cannot_hold_it_refuse_it_before_the_work(request_: ExportRequest, container: str) -> None:
    error = refused(dataclasses.replace(request_, formats=("onnx", container), dtype=None), "110")
    assert isinstance(error, NotRepresentable)
    assert error.exit_code == 7
    assert error.next_step == "Use one of: --format onnx, no --vocab-keep."


def test_an_artifact_says_what_it_keeps_and_what_that_costs(request_: ExportRequest, tmp_path: Path) -> None:
    result = export(request_)
    manifest, tokens = result.manifest, result.plan.head_tokens
    assert manifest is not None
    assert tokens is not None
    record = manifest.vocabulary
    assert record is not None
    assert (record.tokens, record.of, manifest.dims["head_rows"]) == (110, VOCAB, 110)
    assert len(tokens) == 110
    (named,) = [item for item in manifest.inputs if item.role == "vocabulary"]
    assert named.id == "110 of 128 tokens"
    assert named.sha256 in (tmp_path / "out" / "provenance.json").read_text(encoding="utf-8")
    plan = json.loads((tmp_path / "out" / "plan.json").read_text(encoding="utf-8"))
    assert (plan["schema_version"], plan["head_tokens"]) == (3, list(tokens))
    assert SubnetPlan.from_json(plan) == result.plan

    # The figures, by transformers' own model.
    data = Path("calibration/instructions/instructions.jsonl").read_text(encoding="utf-8")
    rows = [json.loads(line) for line in data.splitlines()]
    documents = ["\n".join(row[key] for key in ("instruction", "input", "output") if row[key]) for row in rows]
    ids = in_a_row(documents, open_tokenizer(Path(request_.model)))[: 8 * 256]
    ids_BT = torch.tensor(ids).reshape(8, 256)
    with torch.no_grad():
        logits = AutoModelForCausalLM.from_pretrained(request_.model)(ids_BT).logits[:, :-1].flatten(0, 1)
    targets = ids_BT[:, 1:].flatten()
    can = torch.isin(targets, torch.tensor(tokens))
    dropped = [idx for idx in range(VOCAB) if idx not in tokens]
    whole = torch.nn.functional.cross_entropy(logits[can], targets[can])
    logits[:, dropped] = -math.inf
    some = torch.nn.functional.cross_entropy(logits[can], targets[can])
    assert record.text == "instructions"
    assert record.num_tokens == 8 * 255
    assert record.unwritable == pytest.approx(1 - float(can.double().mean()))
    assert record.loss == pytest.approx(float(some), rel=1e-4)
    assert record.loss_of_all_tokens == pytest.approx(float(whole), rel=1e-4)
    assert record.loss < record.loss_of_all_tokens

    share = percent(record.unwritable or 0.0)
    assert record.words == (
        f"logits of 110 of 128 tokens; {share} of the tokens of 'instructions' cannot be written, loss of the others "
        f"{record.loss:.3f} ({record.loss_of_all_tokens:.3f} among all tokens)"
    )
    assert artifact_page(tmp_path / "out").count("logits of 110 of 128 tokens") == 1
    with pytest.raises(InputError, match="a text with any other token has no finite loss"):
        evaluate(EvaluateRequest(model=str(tmp_path / "out"), text=Path(__file__)))

    verified = verify(tmp_path / "out", model=request_.model)
    assert verified.verification is not None
    assert verified.plan.head_tokens == tokens


def test_text_that_cannot_be_written_is_counted(request_: ExportRequest, tmp_path: Path) -> None:
    """The letters of this vocabulary are always kept, so its one longer piece is what can be missing."""
    (tmp_path / "ids.json").write_text("[]")
    manifest = export(dataclasses.replace(request_, vocab_keep=str(tmp_path / "ids.json"))).manifest
    assert manifest is not None
    assert manifest.vocabulary is not None
    assert 0 < (manifest.vocabulary.unwritable or 0) < 0.1


def test_a_plan_says_its_tokens(request_: ExportRequest, tmp_path: Path) -> None:
    first = export(request_)
    again = dataclasses.replace(request_, plan=tmp_path / "out", shape=None, vocab_keep=None, out=tmp_path / "again")
    assert export(again).plan == first.plan
    for name in ("onnx/model.onnx", "onnx/model.onnx.data", "plan.json", "provenance.json"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "out" / name).read_bytes()
    with pytest.raises(UsageError, match="chooses other tokens than the plan names"):
        export(dataclasses.replace(again, vocab_keep="111", out=tmp_path / "third"))


def test_a_changed_plan_or_manifest_is_found(request_: ExportRequest, tmp_path: Path) -> None:
    export(request_)
    out, model = tmp_path / "out", load_supernet(request_.model)
    manifest = json.loads((out / "amoeba.json").read_text(encoding="utf-8"))
    assert manifest["vocabulary"]["tokens"] == 110
    plan = json.loads((out / "plan.json").read_text(encoding="utf-8"))
    tokens = plan["head_tokens"]
    other = sorted({*tokens[:-1], next(idx for idx in range(VOCAB) if idx not in tokens)})
    for wrong in (other, tokens[:-1]):
        (out / "plan.json").write_text(json.dumps({**plan, "head_tokens": wrong}))
        with pytest.raises((NotAsWritten, InputError)):
            verify(out, model=request_.model)
    assert model.architecture.head_rows is None


@pytest.mark.parametrize("tokens", [[], [1, 1], [5, 4], [0, 128], [-1, 3], ["a"], "0-3", 7])
def test_a_plan_with_other_tokens_than_a_model_can_have(
    request_: ExportRequest, tmp_path: Path, tokens: object
) -> None:
    result = export(request_)
    data = {**result.plan.to_json(), "head_tokens": tokens}
    (tmp_path / "plan.json").write_text(json.dumps(data))
    with pytest.raises((InputError, DamagedFile)):
        export(
            dataclasses.replace(
                request_, plan=tmp_path / "plan.json", shape=None, vocab_keep=None, out=tmp_path / "again"
            )
        )
