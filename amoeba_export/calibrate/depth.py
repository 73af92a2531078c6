"""Which layers to keep at each depth: dynamic programming over layers (paper section 3.2; upstream `layer_calib_dp`).

A cell (n, m) of the table holds the best ways found so far to remove m layers out of the last n prunable ones. Row n
may also remove layer N - n; its candidates come from row n - 1 alone, so they are independent of each other.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np

from amoeba_export.errors import NotANumber, UsageError
from amoeba_export.ir.metric import Mode, badness, better

if TYPE_CHECKING:
    from numpy.typing import NDArray


class Evaluate(Protocol):
    """Measures one choice of layers."""

    def __call__(self, active: NDArray[np.bool_], bound: float | None = None) -> float:
        """The metric with only the `active` layers [L] kept.

        May return any value that is not better than `bound` as soon as it knows that the true one is not.
        """


@dataclass(frozen=True, slots=True, kw_only=True)
class DepthStrategy:
    """The result of a search.

    Attributes:
        active: Number of removed layers, from 1 -> which layers stay, bool [L].
        metric: Number of removed layers -> the metric of that choice.
    """

    active: dict[int, NDArray[np.bool_]]
    metric: dict[int, float]


@dataclass(frozen=True, slots=True)
class Choice:
    """Layers that stay, and their metric; `lineage` marks what a search with a beam of 1 would hold."""

    active: tuple[bool, ...]
    metric: float
    lineage: bool = True


@dataclass(frozen=True, slots=True)
class Challenge:
    """A candidate, and the choice it has to beat to get into its cell; None when the cell has room."""

    active: tuple[bool, ...]
    rival: Choice | None

    @property
    def removed(self) -> list[int]:
        """Layers that the candidate leaves out."""
        return [layer for layer, keep in enumerate(self.active) if not keep]


Judge = Callable[[Sequence[Challenge]], Sequence[float | None]]
"""The metric of each candidate of a row, or None for one that does not beat its rival. With a beam of 1 nothing else
looks at the metric, so a judge that decides in another way may leave it open (NaN)."""


def search_depth(
    evaluate: Evaluate, *, num_layers: int, max_removed: int, keep_last: int = 0, mode: Mode = "min", beam: int = 1
) -> DepthStrategy:
    """Search the layers to keep for 1 to `max_removed` removed ones, one evaluation per candidate.

    With N = num_layers - keep_last, for n = 1..N and m = 1..min(n, max_removed): the candidate is the choice of cell
    (n-1, m-1) with layer N-n removed; it replaces the choice of cell (n-1, m) if its metric is strictly better.

    Args:
        evaluate: Called in that order. Its `bound` is the metric to beat, or None when there is nothing to beat.
        num_layers: Layers of the model.
        max_removed: Most layers to remove.
        keep_last: Layers at the end that always stay.
        mode: Whether lower or higher is better.
        beam: Choices kept per cell; 1 is the paper's algorithm. Whatever `beam` is, the choice of the paper's algorithm
            stays in its cell, so that a wider beam is never worse.

    Raises:
        UsageError: There are not that many layers to remove.
        NotANumber: The metric of a candidate is NaN.
    """

    def judge(challenges: Sequence[Challenge]) -> list[float | None]:
        metrics = []
        for challenge in challenges:
            bound = challenge.rival.metric if challenge.rival else None
            metric = evaluate(np.array(challenge.active), bound=bound)
            if math.isnan(metric):
                raise NotANumber("metric", challenge.removed)
            metrics.append(metric if bound is None or better(metric, bound, mode) else None)
        return metrics

    choices = fill_table(
        judge, num_layers=num_layers, max_removed=max_removed, keep_last=keep_last, mode=mode, beam=beam
    )
    return DepthStrategy(
        active={removed: np.array(choice.active) for removed, choice in choices.items()},
        metric={removed: choice.metric for removed, choice in choices.items()},
    )


def fill_table(
    judge: Judge, *, num_layers: int, max_removed: int, keep_last: int = 0, mode: Mode = "min", beam: int = 1
) -> dict[int, Choice]:
    """`search_depth` with a row of candidates judged at once. Returns the best choice per number of removed layers."""
    num_prunable = num_layers - keep_last
    if not 1 <= max_removed <= num_prunable or max_removed >= num_layers or beam < 1:
        raise UsageError(
            f"{max_removed} layers cannot be removed from a model with {num_layers} layers whose last {keep_last} stay"
            f" (beam {beam}).",
            next_step=f"Remove between 1 and {min(num_prunable, num_layers - 1)} layers, with a beam of at least 1.",
        )
    cells: list[list[Choice]] = [[Choice((True,) * num_layers, math.nan)]] + [[] for _ in range(max_removed)]
    for row in range(1, num_prunable + 1):
        layer = num_prunable - row
        parents = [(m, choice) for m in range(1, min(row, max_removed) + 1) for choice in cells[m - 1]]
        challenges = [
            Challenge(_without(choice.active, layer), cells[m][-1] if len(cells[m]) == beam else None)
            for m, choice in parents
        ]
        metrics = judge(challenges)
        new_cells = [list(cell) for cell in cells]
        for (m, parent), challenge, metric in zip(parents, challenges, metrics, strict=True):
            if metric is not None:
                new_cells[m].append(Choice(challenge.active, metric, parent.lineage))
        cells = [cells[0]] + [_cut_to_beam(cell, beam, mode) for cell in new_cells[1:]]
    return {m: cells[m][0] for m in range(1, max_removed + 1)}


def _without(active: tuple[bool, ...], layer: int) -> tuple[bool, ...]:
    return (*active[:layer], False, *active[layer + 1 :])


def _cut_to_beam(cell: list[Choice], beam: int, mode: Mode) -> list[Choice]:
    """The `beam` best, the earlier one first among equals; the better of two lineages stays, and is always kept."""
    if beam == 1:
        return cell[-1:]  # the last one won
    lineages = [choice for choice in cell if choice.lineage]
    line = lineages[0] if lineages else None
    for choice in lineages[1:]:
        if line is not None and better(choice.metric, line.metric, mode):
            line = choice
    cell = [Choice(choice.active, choice.metric, choice is line) for choice in cell]
    ranked = sorted(cell, key=lambda choice: badness(choice.metric, mode))
    kept = ranked[:beam]
    if line is not None and not any(choice.lineage for choice in kept):
        kept[-1] = next(choice for choice in ranked if choice.lineage)
    return kept
