"""The vocabulary in a GGUF file, from `tokenizer.json`.

llama.cpp has its own tokenizers and knows splitting rules by name (`tokenizer.ggml.pre`). We recognise the rules of the
families that we cut; a rule that we do not know is refused, because a wrong one tokenizes text differently in silence.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import gguf

from amoeba_export.errors import DamagedFile, NotRepresentable
from amoeba_export.formats.sidecars import tokenizer_folder
from amoeba_export.ir import Subnet
from amoeba_export.reading import read_json_object

_GPT4 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|"
    r"\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_RULES = {_GPT4 % r"\p{N}{1,3}": "llama-bpe", _GPT4 % r"\p{N}": "qwen2", _TEKKEN: "tekken"}
"""The regular expression that splits text -> llama.cpp's name for it."""

_SPLITS = {("ByteLevel",): "gpt-2", ("Digits", "ByteLevel"): "smollm"}
"""Splitting without an expression of its own -> llama.cpp's name for it."""


def add_tokenizer(header: gguf.GGUFWriter, subnet: Subnet) -> None:
    """Add tokens, merges or scores, special tokens and chat template. Without a tokenizer, say that there is none.

    Raises:
        DamagedFile: `tokenizer.json` is not one.
        NotRepresentable: It is of a kind, or splits text by a rule, that has no name in llama.cpp.
    """
    folder = tokenizer_folder(subnet)
    path = folder / "tokenizer.json"
    vocab_size = subnet.architecture.base.vocab_size
    if not path.is_file():
        if (folder / "tokenizer.model").is_file():
            raise _unknown("the model has tokenizer.model and no tokenizer.json; save it again with transformers")
        header.add_tokenizer_model("none")
        return
    try:
        content = read_json_object(path, what="The tokenizer", any_text=True)
        model, added = content["model"], content.get("added_tokens", [])
        vocabulary: Mapping[str, int] = model["vocab"]
    except (ValueError, KeyError, TypeError) as error:
        raise DamagedFile(path, f"not a tokenizer ({type(error).__name__}: {error})") from error
    if model.get("type") != "BPE" or not isinstance(vocabulary, Mapping):
        raise _unknown(f"its tokenizer is a {model.get('type')}, not BPE")
    tokens = _tokens(vocabulary, added, vocab_size, path)
    byte_level = not model.get("byte_fallback")
    if byte_level:
        header.add_tokenizer_model("gpt2")
        header.add_tokenizer_pre(_splitting_rule(content.get("pre_tokenizer") or {}))
    else:
        header.add_tokenizer_model("llama")
        header.add_tokenizer_pre("default")
        header.add_token_scores(_scores(tokens, model["merges"]))
        header.add_add_space_prefix(_prepends_space(content))
    header.add_token_list(tokens)
    header.add_token_types(_types(tokens, added, model.get("unk_token"), byte_level=byte_level))
    gguf.SpecialVocab(folder, load_merges=byte_level, n_vocab=vocab_size).add_to_gguf(header, quiet=True)


def _unknown(reason: str) -> NotRepresentable:
    return NotRepresentable("GGUF", reason, ("--format safetensors", "--format onnx"))


def _tokens(
    vocabulary: Mapping[str, int], added: Sequence[Mapping[str, Any]], vocab_size: int, path: Path
) -> list[str]:
    """One name for every row of the embedding; rows without a token are called `[PAD<idx>]`, as converters do."""
    by_id = {idx: token for token, idx in vocabulary.items()} | {int(t["id"]): str(t["content"]) for t in added}
    if by_id and max(by_id) >= vocab_size:
        raise DamagedFile(path, f"token {max(by_id)} is beyond the {vocab_size} rows of the embedding")
    return [by_id.get(idx, f"[PAD{idx}]") for idx in range(vocab_size)]


def _types(
    tokens: Sequence[str], added: Sequence[Mapping[str, Any]], unknown: str | None, *, byte_level: bool
) -> list[int]:
    special = {int(token["id"]): bool(token.get("special")) for token in added}
    types = []
    for idx, token in enumerate(tokens):
        if idx in special:
            kind = gguf.TokenType.CONTROL if special[idx] else gguf.TokenType.USER_DEFINED
        elif token == f"[PAD{idx}]":
            kind = gguf.TokenType.UNUSED
        elif not byte_level and len(token) == 6 and token.startswith("<0x"):
            kind = gguf.TokenType.BYTE
        else:
            kind = gguf.TokenType.NORMAL
        if token == unknown:
            kind = gguf.TokenType.UNKNOWN
        types.append(int(kind))
    return types


def _scores(tokens: Sequence[str], merges: Sequence[str | Sequence[str]]) -> list[float]:
    """Scores that make llama.cpp's highest-score-first merging follow the merges in their order."""
    rank: dict[str, int] = {}
    for idx, merge in enumerate(merges):
        left, right = merge.split(" ", 1) if isinstance(merge, str) else merge
        rank.setdefault(left + right, idx)
    return [-float(rank.get(token, len(rank))) for token in tokens]


def _splitting_rule(pre_tokenizer: Mapping[str, Any]) -> str:
    parts = pre_tokenizer.get("pretokenizers", [pre_tokenizer])
    for part in parts:
        rule = _RULES.get((part.get("pattern") or {}).get("Regex", ""))
        if part.get("type") == "Split" and rule:
            return rule
    name = _SPLITS.get(tuple(part.get("type") for part in parts))
    if name is None or not parts[-1].get("use_regex", True):
        raise _unknown("its tokenizer splits text by a rule that has no name in llama.cpp")
    return name


def _prepends_space(content: Mapping[str, Any]) -> bool:
    """Whether text gets a leading space, by a normalizer (Llama 2) or by a Metaspace pre-tokenizer (newer files)."""
    text = json.dumps([content.get("normalizer"), content.get("pre_tokenizer")])
    return '"Prepend"' in text or '"prepend_scheme": "first"' in text or '"prepend_scheme": "always"' in text
