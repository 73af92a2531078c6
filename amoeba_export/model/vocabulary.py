"""Tokens that a head needs whatever else it drops, and how often a text has each."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from amoeba_export.errors import InputError
from amoeba_export.model.samples import Tokenizer
from amoeba_export.reading import read_json_object

ENDS = ("bos_token_id", "eos_token_id", "pad_token_id")
"""Keys of a config whose tokens a text begins and ends with; each is an id or a list of them."""

_BYTE = re.compile(r"<0x[0-9A-F]{2}>")
_SPACE = "\u2581"
"""How SentencePiece spells a space."""


def named_tokens(folder: Path, config: Mapping[str, Any]) -> set[int]:
    """Ids that a model's config and generation config name: where texts begin and end."""
    file = folder / "generation_config.json"
    configs = [config, *([read_json_object(file, what="The generation config")] if file.is_file() else [])]
    values = [one.get(key) for one in configs for key in ENDS]
    ids = [idx for value in values for idx in (value if isinstance(value, list) else [value])]
    return {idx for idx in ids if isinstance(idx, int) and not isinstance(idx, bool)}


def writable_tokens(tokenizer: Any) -> set[int]:
    """Ids of special and added tokens, and of the pieces that every text can be written with.

    Those are the tokens of bytes: `<0x00>` to `<0xFF>`, or the 256 letters that stand for them in byte-level
    vocabularies. With a vocabulary that has neither, they are all pieces of one letter.
    """
    from tokenizers.pre_tokenizers import ByteLevel

    words: Mapping[str, int] = tokenizer.get_vocab()
    special = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
    spelled = {idx for word, idx in words.items() if _BYTE.fullmatch(word)}
    letters = set(ByteLevel.alphabet())
    if len(spelled) < 256 and not letters <= words.keys():
        return special | {idx for word, idx in words.items() if len(word.removeprefix(_SPACE)) <= 1}
    return special | spelled | {idx for word, idx in words.items() if word in letters or word == _SPACE}


def shares_of(documents: Iterable[str], tokenizer: Tokenizer) -> dict[int, float]:
    """Of all tokens of some texts, the share that each token has."""
    counts: Counter[int] = Counter()
    for document in documents:
        counts.update(tokenizer.encode(document, add_special_tokens=False, verbose=False))
    total = counts.total()
    if not total:
        raise InputError("The text has no token.", next_step="Give a longer text.")
    return {token: count / total for token, count in counts.items()}
