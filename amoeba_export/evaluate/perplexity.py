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
from amoeba_export.reading.records import read_text

WHAT = "evaluation text"


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
        tokenizer: Of transformers. Its opening token, if it adds one, is only at the start of the text.
        window: Tokens.
        limit: The first so many windows, or None for all.

    Raises:
        InputError: The file is missing, empty, not text, or shorter than one window.
    """
    # Not verbose: it would warn of a text that is longer than the model takes, and only windows of it are run.
    tokens = tokenizer(read_text(path, what=WHAT), verbose=False)["input_ids"]
    windows = [list(tokens[start : start + window]) for start in range(0, len(tokens) - window + 1, window)]
    if not windows:
        raise InputError(
            f"The evaluation text has {len(tokens)} tokens, fewer than one window of {window}.",
            where=path,
            next_step="Give a longer text, or a smaller --window.",
        )
    return windows[:limit]


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
