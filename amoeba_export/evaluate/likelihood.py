"""Log-probabilities of given tokens: what perplexity, multiple choice and lm-eval all come down to.

B rows, T tokens, V vocabulary, P selected positions.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch.nn import functional

from amoeba_export.evaluate.model import LanguageModel
from amoeba_export.ir import SILENT, Progress

_Group = tuple[tuple[tuple[int, ...], int], list[int]]
"""Rows that run as one: ((all tokens but the last, first scored token), which rows)."""


class Scored(NamedTuple):
    """Of one row's scored tokens: their summed log-probability, and whether each was the most probable one."""

    log_prob: float
    is_greedy: bool


def log_likelihoods(
    model: LanguageModel,
    rows: Sequence[Sequence[int]],
    starts: Sequence[int],
    *,
    batch_tokens: int = 2048,
    description: str = "Scoring",
    progress: Progress = SILENT,
) -> list[Scored]:
    """Score each row's tokens from its start on, in the order of `rows`.

    Rows that differ in their last token alone run once, as the lettered choices of one question do: the logits before
    that token serve all of them.
    """
    merged: dict[tuple[tuple[int, ...], int], list[int]] = {}
    for index, (row, start) in enumerate(zip(rows, starts, strict=True)):
        merged.setdefault((tuple(row[:-1]), start), []).append(index)
    groups = sorted(merged.items(), key=lambda group: -len(group[0][0]))  # long ones first: memory runs out early
    scores: list[Scored | None] = [None] * len(rows)
    with progress.track(description, len(rows)) as advance:
        while groups:
            longest = len(groups[0][0][0])
            some, groups = groups[: max(batch_tokens // longest, 1)], groups[max(batch_tokens // longest, 1) :]
            for index, scored in _run(model, rows, some):
                scores[index] = scored
            advance(sum(len(members) for _, members in some))
    return [scored for scored in scores if scored is not None]


def _run(model: LanguageModel, rows: Sequence[Sequence[int]], groups: Sequence[_Group]) -> Iterator[tuple[int, Scored]]:
    length = max(len(prefix) for (prefix, _), _ in groups)
    input_ids_BT = torch.zeros(len(groups), length, dtype=torch.int64)
    select_BT = torch.zeros(len(groups), length, dtype=torch.bool)
    for b, ((prefix, start), _) in enumerate(groups):
        input_ids_BT[b, : len(prefix)] = torch.tensor(prefix)
        select_BT[b, start - 1 : len(prefix)] = True
    log_probs_PV = functional.log_softmax(model.logits(input_ids_BT, select_BT), dim=-1)
    best_P = log_probs_PV.argmax(dim=-1).cpu()
    first = 0
    for (prefix, start), members in groups:
        span = slice(first, first + len(prefix) - start + 1)
        first = span.stop
        for index in members:
            targets_T = torch.tensor(rows[index][start:])
            log_prob = log_probs_PV[span].gather(1, targets_T.to(log_probs_PV.device)[:, None]).sum().item()
            yield index, Scored(log_prob, bool((best_P[span] == targets_T).all()))
