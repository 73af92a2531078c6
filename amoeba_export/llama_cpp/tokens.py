"""Do a GGUF file and a tokenizer make the same tokens of a text? llama.cpp is asked for those of the file."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

TEXTS = (
    "",
    " ",
    "the cat",
    "  led by   spaces",
    "trailing \n \n\n",
    "a\tb\r\n\tc",
    "1999 2019 12345678",
    "a  1 b 22  c333",
    "x=1,y=2.50;z+=3*4",
    "I'm sure they'd say WE'LL, don't you?",
    "naïve café, élan",
    "Привет, мир 42",
    "日本語のテスト",
    "🙂👍🏽 ok",
    "def f(x):\n    return x**2  # two\n",
    '"...!?" -- (a_b) [c] {d} <e>',
    "camelCase ALLCAPS Mixed",
    "a\u2581b \u00a0c",
)
"""What tokenizers disagree about: spaces, digits, line ends, apostrophes, other scripts, signs."""

_AROUND = ("{}the cat", "the cat{} sat", "{}  led{}\n{}", " {} 1")
"""With a special token in the place of braces."""

_MAX_SPECIAL = 4


def hard_texts(special: Sequence[str]) -> list[str]:
    """`TEXTS`, and texts with some of the `special` tokens in them."""
    return [*TEXTS, *(around.replace("{}", token) for token in special[:_MAX_SPECIAL] for around in _AROUND)]


def questions(texts: Sequence[str]) -> list[tuple[str, Mapping[str, Any]]]:
    """What to `ask` for the tokens of `texts`, special tokens in them read as such."""
    return [("tokenize", {"content": text, "add_special": True, "parse_special": True}) for text in texts]


def differences(texts: Sequence[str], answers: Sequence[Any], encode: Callable[[str], Sequence[int]]) -> list[str]:
    """One sentence for each text of which `encode` makes other tokens than llama.cpp answered."""
    found = []
    for text, answer in zip(texts, answers, strict=True):
        theirs = [int(token) for token in answer["tokens"]]
        ours = [int(token) for token in encode(text)]
        if theirs != ours:
            found.append(f"{text!r} is {_short(theirs)} to llama.cpp and {_short(ours)} to its tokenizer")
    return found


def _short(tokens: Sequence[int]) -> str:
    return str(list(tokens)) if len(tokens) <= 12 else f"{str(list(tokens[:12]))[:-1]}, ...]"
