"""What llama.cpp calls the steps that a tokenizer takes before its merges. The whole pipeline decides, step by step.

A known expression behind a step that is not known splits otherwise; so does an option of a step. The names are
those of llama.cpp's `llama-vocab.cpp`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_GPT4 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|"
    r"\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

_ENDINGS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
_GPT4O = (
    rf"[^\r\n\p{{L}}\p{{N}}]?[\p{{Lu}}\p{{Lt}}\p{{Lm}}\p{{Lo}}\p{{M}}]*[\p{{Ll}}\p{{Lm}}\p{{Lo}}\p{{M}}]+{_ENDINGS}|"
    rf"[^\r\n\p{{L}}\p{{N}}]?[\p{{Lu}}\p{{Lt}}\p{{Lm}}\p{{Lo}}\p{{M}}]+[\p{{Ll}}\p{{Lm}}\p{{Lo}}\p{{M}}]*{_ENDINGS}|"
    r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

_Steps = tuple[tuple[Any, ...], ...]

_BYTES = ("ByteLevel", False, False)
_WORDS_AND_BYTES = ("ByteLevel", False, True)
_NAMES: Mapping[tuple[_Steps, bool], str] = {
    ((("Split", _GPT4 % r"\p{N}{1,3}", "Isolated", False), _BYTES), True): "llama-bpe",
    ((("Split", _GPT4 % r"\p{N}{1,3}", "Isolated", False), _BYTES), False): "smaug-bpe",
    ((("Split", _GPT4 % r"\p{N}", "Isolated", False), _BYTES), False): "qwen2",
    ((("Split", _TEKKEN, "Isolated", False), _BYTES), True): "tekken",
    ((("Split", _GPT4O, "Isolated", False), _BYTES), False): "gpt-4o",
    ((_WORDS_AND_BYTES,), False): "gpt-2",
    ((("Digits", True), _WORDS_AND_BYTES), False): "smollm",
}
"""Steps, and whether a piece that is a token is taken without merging -> `tokenizer.ggml.pre`."""

_COMPOSES = ("qwen2",)
"""Their published tokenizers put letters and accents together first (NFC); llama.cpp takes text as it comes."""


def splitting_rule(content: Mapping[str, Any]) -> str | None:
    """llama.cpp's name for what a byte-level `tokenizer.json` does, None when it has none."""
    steps = tuple(_step(part) for part in _parts(content.get("pre_tokenizer"), "pretokenizers"))
    name = _NAMES.get((steps, bool(content["model"].get("ignore_merges", False))))
    normalizers = [part.get("type") for part in _parts(content.get("normalizer"), "normalizers")]
    allowed = [["NFC"], []] if name in _COMPOSES else [[]]
    return name if normalizers in allowed else None


def leading_space(content: Mapping[str, Any]) -> bool | None:
    """Whether a SentencePiece `tokenizer.json` puts a space in front of each piece of text; None for anything else.

    llama.cpp puts one before every piece, behind special tokens too, whatever it begins with, or before none.
    """
    normalizers = [_step(part) for part in _parts(content.get("normalizer"), "normalizers")]
    splits = [_step(part) for part in _parts(content.get("pre_tokenizer"), "pretokenizers")]
    space = ("Replace", " ", "\u2581")
    if not splits and normalizers in ([space], [("Prepend", "\u2581"), space]):
        return len(normalizers) == 2
    return False if not normalizers and splits == [("Metaspace", "\u2581", "never", False)] else None


def _parts(step: Mapping[str, Any] | None, key: str) -> list[Mapping[str, Any]]:
    """The steps of a sequence, or the one."""
    if step is None:
        return []
    return [part for inner in step.get(key, []) for part in _parts(inner, key)] if key in step else [step]


def _step(part: Mapping[str, Any]) -> tuple[Any, ...]:
    """A step with every option that changes what it does. A kind that is not listed equals none in the table."""
    kind = part.get("type")
    pattern = part.get("pattern") or {}
    behavior, inverted = part.get("behavior"), part.get("invert", False)
    if (behavior, inverted) == ("Removed", True):  # what no match covers goes, and those of the table cover everything
        behavior, inverted = "Isolated", False
    options: Mapping[Any, tuple[Any, ...]] = {
        "Split": (pattern.get("Regex"), behavior, inverted),
        "ByteLevel": (part.get("add_prefix_space", True), part.get("use_regex", True)),
        "Digits": (part.get("individual_digits", False),),
        "Metaspace": (part.get("replacement"), part.get("prepend_scheme", "always"), part.get("split", True)),
        "Replace": (pattern.get("String"), part.get("content")),
        "Prepend": (part.get("prepend"),),
    }
    return (kind, *options.get(kind, ()))
