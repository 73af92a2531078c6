"""Multiple-choice accuracy: the choice that the model finds most probable after the prompt.

As lm-eval-harness scores it: prompt and choice are tokenized together, and the tokens after the prompt's own count.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from amoeba_export.errors import InputError
from amoeba_export.evaluate.likelihood import log_likelihoods
from amoeba_export.evaluate.model import LanguageModel
from amoeba_export.evaluate.tasks import Item, Task
from amoeba_export.ir import SILENT, Progress


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskScore:
    """Accuracies of one task, as fractions.

    Attributes:
        accuracy: Share of items whose answer has the highest probability.
        accuracy_norm: The same with the probability per character.
        score: The one of the two that the task asks for.
        stderr: Standard error of `score`.
        num_items: Number of items.
    """

    accuracy: float
    accuracy_norm: float
    score: float
    stderr: float
    num_items: int

    @classmethod
    def of(cls, accuracy: float, accuracy_norm: float, num_items: int, *, metric: str = "accuracy") -> TaskScore:
        """The scores of `num_items` answers, with the standard error of a mean of zeros and ones."""
        score = accuracy_norm if metric == "accuracy_norm" else accuracy
        stderr = math.sqrt(score * (1 - score) / max(num_items - 1, 1))
        return cls(accuracy=accuracy, accuracy_norm=accuracy_norm, score=score, stderr=stderr, num_items=num_items)


def score_task(
    model: LanguageModel,
    task: Task,
    tokenizer: Any,
    *,
    max_length: int = 2048,
    batch_tokens: int = 2048,
    progress: Progress = SILENT,
) -> TaskScore:
    """Ask every item.

    Args:
        model: Who is asked.
        task: What is asked.
        tokenizer: Of the model.
        max_length: Longer questions lose their beginning.
        batch_tokens: Rows run together up to so many tokens, padding counted.
        progress: Told of every item.

    Raises:
        InputError: A choice without a token.
    """
    rows, starts, owners = [], [], []
    for number, item in enumerate(task.items):
        for row, start in _rows(item, tokenizer, max_length):
            rows.append(row)
            starts.append(start)
            owners.append(number)
    scores = log_likelihoods(model, rows, starts, batch_tokens=batch_tokens, description=task.name, progress=progress)
    sums: dict[int, list[float]] = {number: [] for number in range(len(task.items))}
    for number, scored in zip(owners, scores, strict=True):
        sums[number].append(scored.log_prob)
    right = right_norm = 0
    for number, item in enumerate(task.items):
        right += _best(sums[number]) == item.answer
        per_character = [total / len(choice) for total, choice in zip(sums[number], item.choices, strict=True)]
        right_norm += _best(per_character) == item.answer
    count = len(task.items)
    return TaskScore.of(right / count, right_norm / count, count, metric=task.metric)


def _rows(item: Item, tokenizer: Any, max_length: int) -> list[tuple[list[int], int]]:
    """Tokens of the prompt with each choice, and where the choice begins."""
    texts = [item.prompt, *(f"{item.prompt} {choice}" for choice in item.choices)]
    prompt, *whole = tokenizer(texts)["input_ids"]
    rows = []
    for choice, tokens in zip(item.choices, whole, strict=True):
        start = min(len(prompt), len(tokens) - 1)
        cut = max(len(tokens) - max_length, 0)
        if len(tokens) < 2 or start - cut < 1:
            raise InputError(
                f"A choice cannot be scored within {max_length} tokens: '{choice[:40]}'.",
                next_step="Give items whose prompts and choices have text in them.",
            )
        rows.append((list(tokens[cut:]), start - cut))
    return rows


def _best(totals: Sequence[float]) -> int:
    return max(range(len(totals)), key=totals.__getitem__)
