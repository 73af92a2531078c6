"""Perplexity of a text, in windows that do not overlap (as GPTQ, FLAP and AmoebaLLM measure WikiText)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from amoeba_export.errors import InputError
from amoeba_export.evaluate.likelihood import log_likelihoods
from amoeba_export.evaluate.model import LanguageModel
from amoeba_export.ir import SILENT, Progress
from amoeba_export.model.samples import in_a_row, opening_of, windows_of
from amoeba_export.reading.records import read_text

WHAT = "evaluation text"

_CHARS_PER_TOKEN = 4
"""About, in English; a text with more takes a second attempt."""

_SPARE_TOKENS = 256
"""Behind the last token that is wanted: where a text ends changes the tokens right before its end, and no others."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TextScore:
    """Mean loss over the predicted tokens of a text, in nats.

    Attributes:
        num_tokens: How many were predicted.
    """

    loss: float
    num_tokens: int

    @property
    def perplexity(self) -> float:
        """exp(loss)."""
        return math.exp(self.loss)


def read_windows(path: Path, tokenizer: Any, *, window: int, limit: int | None = None) -> list[list[int]]:
    """The text as windows of `window` tokens; what is left at its end is not used.

    Args:
        path: A text file; all of it is one text.
        tokenizer: Of transformers. Every window opens as it opens a text.
        window: Tokens, the opening among them.
        limit: The first so many windows, or None for all.

    Raises:
        InputError: The file is missing, empty, not text, or shorter than one window.
    """
    text, opening = read_text(path, what=WHAT), opening_of(tokenizer)
    tokens = in_a_row([text], tokenizer) if limit is None else _first_tokens(text, tokenizer, limit * window)
    windows = windows_of(tokens, window, opening)
    if not windows:
        raise InputError(
            f"The evaluation text has {len(opening) + len(tokens)} tokens, fewer than one window of {window}.",
            where=path,
            next_step="Give a longer text, or a smaller --window.",
        )
    return windows[:limit]


def _first_tokens(text: str, tokenizer: Any, wanted: int) -> list[int]:
    """The first so many tokens of the text, if it has them: those of a beginning that goes on for a while."""
    size = _CHARS_PER_TOKEN * (wanted + _SPARE_TOKENS)
    while size < len(text):
        tokens = in_a_row([text[:size]], tokenizer)
        if len(tokens) >= wanted + _SPARE_TOKENS:
            return tokens[:wanted]
        size *= 2
    return in_a_row([text], tokenizer)


def measure_perplexity(
    model: LanguageModel, windows: Sequence[Sequence[int]], *, batch_tokens: int = 1024, progress: Progress = SILENT
) -> TextScore:
    """Loss over every token of every window but the first of each.

    Args:
        model: What is measured.
        windows: Of equal length.
        batch_tokens: Windows run together up to so many tokens. Their logits over the vocabulary are in memory at once.
        progress: Told of every window.
    """
    scores = log_likelihoods(
        model, windows, [1] * len(windows), batch_tokens=batch_tokens, description="Perplexity", progress=progress
    )
    num_tokens = sum(len(window) - 1 for window in windows)
    return TextScore(loss=-math.fsum(scored.log_prob for scored in scores) / num_tokens, num_tokens=num_tokens)
