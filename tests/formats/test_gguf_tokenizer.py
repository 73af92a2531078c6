"""Tokenizers in GGUF files: which are written, how text begins and ends, and what llama.cpp says to it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gguf
import pytest
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from amoeba_export import llama_cpp
from amoeba_export.backends import Subject, measure_latency
from amoeba_export.errors import NotRepresentable, TokensDiffer
from amoeba_export.formats.gguf.splitting import leading_space, splitting_rule
from amoeba_export.formats.gguf.tokenizer import _ends
from amoeba_export.ir import Latency, SubnetPlan, Target, Workload
from amoeba_export.load import load_supernet
from amoeba_export.materialize import materialize_subnet
from amoeba_export.verify import verify_artifact
from amoeba_export.verify.gguf_tokens import check_tokens
from tests.formats.bpe import save_bpe
from tests.materialize.subnets import open_supernet, write
from tests.tiny import save_tiny

WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
GPT4O = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
    r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA3, QWEN2 = WORDS % r"\p{N}{1,3}", WORDS % r"\p{N}"


def split(pattern: str, behaviour: str = "isolated", **options: Any) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Split(Regex(pattern), behaviour, **options)


def bytes_(*, space: bool = False, words: bool = False) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.ByteLevel(add_prefix_space=space, use_regex=words)


def content(steps: Sequence[Any], *, normalizer: Any = None, ignores_merges: bool = False) -> Mapping[str, Any]:
    tokenizer = Tokenizer(models.BPE(ignore_merges=ignores_merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(list(steps)) if len(steps) > 1 else steps[0]
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    read: Mapping[str, Any] = json.loads(tokenizer.to_str())
    return read


DIGITS = pre_tokenizers.Digits(individual_digits=True)


@pytest.mark.parametrize(
    ("read", "name"),
    [
        (content([split(LLAMA3), bytes_()], ignores_merges=True), "llama-bpe"),
        (content([split(LLAMA3), bytes_()]), "smaug-bpe"),
        (content([split(QWEN2), bytes_()]), "qwen2"),
        (content([split(QWEN2), bytes_()], normalizer=normalizers.NFC()), "qwen2"),
        (content([split(GPT4O), bytes_()]), "gpt-4o"),
        (content([split(GPT4O, "removed", invert=True), bytes_()]), "gpt-4o"),
        (content([split(LLAMA3, "removed", invert=True), bytes_()]), "smaug-bpe"),
        (content([split(GPT4O), bytes_()], ignores_merges=True), None),
        (content([bytes_(words=True)]), "gpt-2"),
        (content([DIGITS, bytes_(words=True)]), "smollm"),
        (content([DIGITS, split(LLAMA3), bytes_()], ignores_merges=True), None),
        (content([split(LLAMA3), DIGITS, bytes_()], ignores_merges=True), None),
        (content([split(LLAMA3, "removed"), bytes_()], ignores_merges=True), None),
        (content([split(LLAMA3, invert=True), bytes_()], ignores_merges=True), None),
        (content([split(LLAMA3), bytes_(words=True)], ignores_merges=True), None),
        (content([split(LLAMA3 + "|x"), bytes_()], ignores_merges=True), None),
        (content([split(QWEN2), bytes_()], ignores_merges=True), None),
        (content([split(QWEN2), bytes_()], normalizer=normalizers.Lowercase()), None),
        (content([bytes_(words=True)], normalizer=normalizers.NFC()), None),
        (content([bytes_(words=True, space=True)]), None),
        (content([bytes_()]), None),
        (content([pre_tokenizers.Digits(), bytes_(words=True)]), None),
        (content([pre_tokenizers.Whitespace(), bytes_(words=True)]), None),
    ],
)
def test_the_whole_pipeline_decides(read: Mapping[str, Any], name: str | None) -> None:
    assert splitting_rule(read) == name


SPACES = normalizers.Replace(" ", "\u2581")


@pytest.mark.parametrize(
    ("normalizer", "step", "space"),
    [
        (normalizers.Sequence([normalizers.Prepend("\u2581"), SPACES]), None, True),
        (SPACES, None, False),
        (normalizers.Sequence([SPACES]), None, False),
        (None, pre_tokenizers.Metaspace(prepend_scheme="never", split=False), False),
        (None, pre_tokenizers.Metaspace(prepend_scheme="first", split=False), None),
        (None, pre_tokenizers.Metaspace(prepend_scheme="always", split=False), None),
        (normalizers.Sequence([normalizers.NFKC(), SPACES]), None, None),
        (None, None, None),
    ],
)
def test_spaces_before_text(normalizer: Any, step: Any, space: bool | None) -> None:
    """Metaspace leaves a text alone that begins with a space, or that follows a special token; llama.cpp does not."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True))
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    if step is not None:
        tokenizer.pre_tokenizer = step
    assert leading_space(json.loads(tokenizer.to_str())) is space


def save_words(
    folder: Path,
    *,
    rule: str = LLAMA3,
    before: str | None = None,
    after: str | None = None,
    bos: str | None = "<s>",
) -> None:
    """Byte-level BPE of Llama 3's rule or another, with tokens around a text as told."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("t", "h"), ("th", "e"), ("Ġ", "the"), ("1", "9"), ("n", "'"), ("l", "C")]
    names = ["<s>", "</s>", *alphabet, *map("".join, merges)]
    tokenizer = Tokenizer(models.BPE({name: idx for idx, name in enumerate(names)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split(rule), bytes_()])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<s>", "</s>"])
    around = [token for token in (before, after) if token]
    if around:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=[part for part in (before, "$A", after) if part],
            special_tokens=[(token, names.index(token)) for token in dict.fromkeys(around)],
        )
    named = {"bos_token": bos} if bos else {}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", **named).save_pretrained(folder)


NUM_TOKENS = 2 + 256 + 6


def written(root: Path, **tokens: Any) -> Path:
    save_tiny(root / "model", vocab_size=NUM_TOKENS, bos_token_id=None, eos_token_id=1, pad_token_id=None)
    save_words(root / "model", **tokens)
    supernet = load_supernet(str(root / "model"))
    subnet = materialize_subnet(supernet, SubnetPlan.full(supernet.architecture))
    return write(subnet, root / "written", "gguf", "fp32")


ENDS = [
    ({"bos": None}, False, False, None),
    ({}, False, False, 0),
    ({"before": "<s>"}, True, False, 0),
    ({"before": "<s>", "bos": None}, True, False, 0),
    ({"after": "</s>"}, False, True, 0),
    ({"before": "<s>", "after": "</s>"}, True, True, 0),
]


@pytest.mark.parametrize(("tokens", "bos", "eos", "bos_id"), ENDS)
def test_a_file_says_how_text_begins_and_ends(
    tokens: dict[str, Any], bos: bool, eos: bool, bos_id: int | None, tmp_path: Path
) -> None:
    fields = gguf.GGUFReader(written(tmp_path, **tokens) / "model.gguf").fields
    assert fields["tokenizer.ggml.add_bos_token"].contents() is bos
    assert fields["tokenizer.ggml.add_eos_token"].contents() is eos
    assert fields["tokenizer.ggml.eos_token_id"].contents() == 1
    found = fields.get("tokenizer.ggml.bos_token_id")
    assert (found.contents() if found else None) == bos_id


@pytest.mark.parametrize("tokens", [ENDS[0][0], ENDS[5][0]], ids=["without", "with"])
def test_llama_cpp_begins_and_ends_it_likewise(tokens: dict[str, Any], tmp_path: Path) -> None:
    """Without the key it puts a token in front of every prompt: token 11 where there is no other."""
    pytest.importorskip("xllamacpp")
    folder = written(tmp_path, **tokens)
    check_tokens(folder, tmp_path / "model")
    questions = [("tokenize", {"content": "the 19", "add_special": True})]
    (answer,) = llama_cpp.ask(folder / "model.gguf", questions, context_tokens=16)
    theirs = PreTrainedTokenizerFast.from_pretrained(tmp_path / "model")("the 19").input_ids
    assert answer["tokens"] == theirs


@pytest.mark.parametrize(
    ("rule", "tokens"),
    [(LLAMA3, ["d", "o", "n", "'", "t", "lC"]), (GPT4O, ["d", "o", "n'", "t", "l", "C"])],
    ids=["llama3", "gpt-4o"],
)
def test_llama_cpp_splits_words_as_the_model_does(rule: str, tokens: list[str], tmp_path: Path) -> None:
    """GPT-4o's rule keeps the end of a contraction with its word, and parts words before a capital letter."""
    pytest.importorskip("xllamacpp")
    folder = written(tmp_path, rule=rule)
    check_tokens(folder, tmp_path / "model")
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tmp_path / "model")
    questions = [("tokenize", {"content": text}) for text in ("don't", "lC")]
    answers = llama_cpp.ask(folder / "model.gguf", questions, context_tokens=16)
    assert tokenizer.convert_ids_to_tokens([idx for answer in answers for idx in answer["tokens"]]) == tokens


class Warned:
    """A progress that keeps its warnings."""

    def __init__(self) -> None:
        self.warnings: list[str] = []

    def note(self, message: str) -> None:
        """Not of interest."""

    def warn(self, message: str) -> None:
        self.warnings.append(message)

    @contextmanager
    def track(self, description: str, total: int) -> Iterator[Callable[[int], None]]:
        yield lambda steps: None


def test_a_chat_template_that_llama_cpp_cannot_parse_is_told_and_harms_nothing(tmp_path: Path) -> None:
    """Verified and timed as any other: its server alone wants another template."""
    pytest.importorskip("xllamacpp")
    model = save_tiny(tmp_path / "model")
    save_bpe(model)
    (model / "chat_template.jinja").write_text("{% frobnicate messages %}", encoding="utf-8")
    supernet = open_supernet(model)
    plan = supernet.full_plan()
    write(materialize_subnet(supernet, plan), tmp_path / "artifact" / "gguf", "gguf", "fp32")
    said = Warned()
    verify_artifact(tmp_path / "artifact", supernet, plan, progress=said)
    assert [warning.partition(":")[0] for warning in said.warnings] == [
        "llama.cpp cannot parse this model's chat template"
    ]
    subject = Subject(dense=supernet.architecture.uncut, artifact=tmp_path / "artifact", dtype="fp32")
    target = Target(name="here", description="", backend="llamacpp", options={"threads": 1})
    (result,) = measure_latency([subject], Workload(prompt_tokens=8, generate_tokens=8), target=target, rounds=1)
    assert isinstance(result, Latency), result


def test_a_chat_template_that_it_parses_is_not_mentioned(tmp_path: Path) -> None:
    pytest.importorskip("xllamacpp")
    model = save_tiny(tmp_path / "model")
    save_bpe(model)
    supernet = open_supernet(model)
    folder = write(materialize_subnet(supernet, supernet.full_plan()), tmp_path / "gguf", "gguf", "fp32")
    said = Warned()
    check_tokens(folder, model, progress=said)
    assert said.warnings == []


def test_two_tokens_in_front_are_refused(tmp_path: Path) -> None:
    save_words(tmp_path)
    settings = json.loads((tmp_path / "tokenizer.json").read_text(encoding="utf-8"))
    token = {"SpecialToken": {"id": "<s>", "type_id": 0}}
    settings["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [token, token, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<s>": {"id": "<s>", "ids": [0], "tokens": ["<s>"]}},
    }
    (tmp_path / "tokenizer.json").write_text(json.dumps(settings), encoding="utf-8")
    with pytest.raises(NotRepresentable, match="adds more than one token before or after a text"):
        _ends(tmp_path)


def test_other_tokens_in_llama_cpp_are_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Asked of a llama.cpp that reads an apostrophe as two tokens."""
    folder = written(tmp_path)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tmp_path / "model")

    def ask(path: Path, questions: Sequence[tuple[str, Mapping[str, Any]]], **_: object) -> list[Any]:
        texts = [str(body["content"]) for _, body in questions]
        return [{"tokens": tokenizer(text).input_ids + [7] * text.count("don't")} for text in texts]

    monkeypatch.setattr(llama_cpp, "is_installed", lambda: True)
    monkeypatch.setattr(llama_cpp, "ask", ask)
    with pytest.raises(TokensDiffer) as caught:
        check_tokens(folder, tmp_path / "model")
    assert caught.value.exit_code == 5
    assert caught.value.what.startswith(
        """llama.cpp splits text differently from the model's tokenizer: "I'm sure they'd say WE'LL, don't you?" is ["""
    )
