"""The vocabulary in a GGUF file, from `tokenizer.json`.

llama.cpp has its own tokenizers and knows splitting rules by name (`tokenizer.ggml.pre`). We recognise the rules of the
families that we cut; a rule that we do not know is refused, because a wrong one tokenizes text differently in silence.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import gguf

from amoeba_export.errors import DamagedFile, NotRepresentable
from amoeba_export.formats.gguf.splitting import leading_space, splitting_rule
from amoeba_export.formats.sidecars import tokenizer_folder
from amoeba_export.ir import Subnet
from amoeba_export.model.loading import ONE_AT_A_TIME
from amoeba_export.model.opening import read_tokenizer
from amoeba_export.reading import panics_as_errors, read_json_object


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
        rule = splitting_rule(content)
        if rule is None:
            raise _unknown("its tokenizer splits text by a rule that has no name in llama.cpp")
        header.add_tokenizer_pre(rule)
    else:
        header.add_tokenizer_model("llama")
        header.add_tokenizer_pre("default")
        header.add_token_scores(_scores(tokens, model["merges"]))
        space = leading_space(content)
        if space is None:
            raise _unknown("its tokenizer puts spaces before text differently from llama.cpp")
        header.add_add_space_prefix(space)
    header.add_token_list(tokens)
    header.add_token_types(_types(tokens, added, model.get("unk_token"), byte_level=byte_level))
    _add_special(header, folder, byte_level=byte_level, vocab_size=vocab_size)


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


def _probe(tokenizer: Any) -> tuple[list[int], list[int]]:
    """A text without and with what is put around it: the first one that the vocabulary has tokens for."""
    for text in ("a", "0", ".", " "):
        bare, whole = (list(tokenizer(text, add_special_tokens=adds).input_ids) for adds in (False, True))
        if bare:
            break
    return bare, whole


@lru_cache(maxsize=8)
def _ends(folder: Path) -> tuple[int | None, int | None]:
    """The tokens that the model's tokenizer puts before and after a text, None for none.

    Asked of transformers, as users load it: `tokenizer_config.json` may overrule `tokenizer.json`.

    Raises:
        DamagedFile: transformers cannot load it.
        NotRepresentable: It adds something else.
    """
    try:
        with ONE_AT_A_TIME, panics_as_errors():
            tokenizer = read_tokenizer(folder)
            bare, whole = _probe(tokenizer)
    except Exception as error:  # transformers and its Rust library raise what they like
        raise DamagedFile(folder, f"transformers cannot load its tokenizer ({error})") from error
    start = next((idx for idx in range(len(whole)) if whole[idx : idx + len(bare)] == bare), None)
    if start is None or start > 1 or len(whole) - start - len(bare) > 1:
        raise _unknown("its tokenizer adds more than one token before or after a text")
    before, after = whole[:start], whole[start + len(bare) :]
    return (before[0] if before else None), (after[0] if after else None)


def _add_special(header: gguf.GGUFWriter, folder: Path, *, byte_level: bool, vocab_size: int) -> None:
    """Special tokens, merges and chat template, and whether a text begins and ends with a token.

    llama.cpp adds a beginning where the file does not say that there is none, if need be token 11.
    """
    special = gguf.SpecialVocab(folder, load_merges=byte_level, n_vocab=vocab_size)
    bos, eos = _ends(folder)
    for name, added in (("bos", bos), ("eos", eos)):
        known = special.special_token_ids.get(name)
        if added is not None and name == "eos" and known not in (None, added):
            raise _unknown(f"its tokenizer ends a text with token {added}, and a reply ends with token {known}")
        if added is not None:
            special.special_token_ids[name] = added
    special.add_special_token = {"bos": bos is not None, "eos": eos is not None}
    special.add_to_gguf(header, quiet=True)
