"""The exact judge: a candidate is given up as soon as no further score can make it better than its rival."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from amoeba_export.calibrate.depth import Challenge
from amoeba_export.calibrate.evaluator import KeptLayers
from amoeba_export.calibrate.ledger import Ledger
from amoeba_export.errors import NotANumber
from amoeba_export.ir.metric import better
from amoeba_export.model.head import Objective

if TYPE_CHECKING:
    from numpy.typing import NDArray

Advance = Callable[[int], None]


class ExactJudge:
    """Judges rows of a depth search (`depth.Judge`), and single candidates (`depth.Evaluate`).

    Scores are never negative, so a partial loss that reaches the rival's is already lost; an accuracy is lost when even
    right answers to all that is left would not do. The result is that of measuring every candidate in full.
    """

    def __init__(self, ledger: Ledger, objective: Objective) -> None:
        self._ledger = ledger
        self._objective = objective

    def __call__(self, active: NDArray[np.bool_], bound: float | None = None) -> float:
        """The metric, or a value that is not better than `bound`."""
        return self._measure([(KeptLayers(tuple(map(bool, active))), bound)])[0]

    def judge(self, challenges: Sequence[Challenge]) -> list[float | None]:
        """The metric of each candidate that beats its rival."""
        bounds = [challenge.rival.metric if challenge.rival else None for challenge in challenges]
        metrics = self._measure(
            [(KeptLayers(challenge.active), bound) for challenge, bound in zip(challenges, bounds, strict=True)]
        )
        return [
            metric if bound is None or better(metric, bound, self._objective.mode) else None
            for metric, bound in zip(metrics, bounds, strict=True)
        ]

    def _measure(self, candidates: Sequence[tuple[KeptLayers, float | None]]) -> list[float]:
        scores: list[list[float]] = [[] for _ in candidates]
        running = list(range(len(candidates)))
        for chunk_idx in range(len(self._ledger.chunks)):
            found = self._ledger.chunk([candidates[i][0] for i in running], chunk_idx)
            for i in running:
                scores[i].extend(found[candidates[i][0]])
                check_number(scores[i], candidates[i][0], self._objective)
            running = [i for i in running if not self._is_lost(scores[i], candidates[i][1])]
        return [self._objective.at_best(part) for part in scores]

    def _is_lost(self, scores: Sequence[float], bound: float | None) -> bool:
        return bound is not None and not better(self._objective.at_best(scores), bound, self._objective.mode)


def check_number(scores: Sequence[float], cut: KeptLayers, objective: Objective) -> None:
    """Raise `NotANumber` if a score is NaN."""
    if np.isnan(scores).any():
        raise NotANumber(objective.name, [layer for layer, keep in enumerate(cut.active) if not keep])
