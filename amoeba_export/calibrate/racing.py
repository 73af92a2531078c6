"""The racing judge: candidate and rival meet on the same samples, until the difference is statistically decided.

Not exact: a comparison is wrong with a probability of about 1 - confidence, mostly where it hardly matters.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from amoeba_export.calibrate.depth import Challenge
from amoeba_export.calibrate.evaluator import KeptLayers
from amoeba_export.calibrate.exact import check_number
from amoeba_export.calibrate.ledger import Ledger
from amoeba_export.ir.metric import badness
from amoeba_export.model.head import Objective
from amoeba_export.student_t import student_t


@dataclass(slots=True)
class _Race:
    """One candidate against one rival; `gains` is how much better each segment is with the candidate."""

    candidate: KeptLayers
    rival: KeptLayers
    gains: list[float] = field(default_factory=list)
    won: bool | None = None


class RacingJudge:
    """Judges rows of a depth search whose cells hold one choice each.

    After each chunk of the ledger (they grow), the mean of the paired differences is compared with zero, by Student's t
    over the segments that were seen, with the correction for a finite population: once all are seen, the decision is
    the exact one. The error probability is shared evenly by the looks. Segments of one sample are taken as independent,
    which their differences nearly are. An empirical Bernstein bound would ask for less, but its range term alone is
    wider than any difference here until thousands of segments are seen.

    A candidate without a rival is not measured before it becomes one. Metrics are left open (NaN).
    """

    def __init__(self, ledger: Ledger, objective: Objective, *, confidence: float) -> None:
        self._ledger = ledger
        self._objective = objective
        self._num_segments = objective.num_segments
        self._looks = len(ledger.chunks)
        self._error = (1 - confidence) / max(1, self._looks - 1)

    def judge(self, challenges: Sequence[Challenge]) -> list[float | None]:
        """NaN for a candidate that wins, None for one that loses."""
        races = [
            _Race(KeptLayers(challenge.active), KeptLayers(challenge.rival.active)) if challenge.rival else None
            for challenge in challenges
        ]
        running = [race for race in races if race is not None]
        for chunk_idx in range(self._looks):
            running = [race for race in running if race.won is None]
            cuts = [cut for race in running for cut in (race.candidate, race.rival)]
            scores = self._ledger.chunk(cuts, chunk_idx)
            for cut, values in scores.items():
                check_number(values.tolist(), cut, self._objective)
            for race in running:
                race.gains.extend(badness(scores[race.rival] - scores[race.candidate], self._objective.mode))
                race.won = self._decide(race.gains)
        return [math.nan if race is None or race.won else None for race in races]

    def _decide(self, gains: Sequence[float]) -> bool | None:
        """True or False when it is decided, None when it is not."""
        num_seen = len(gains)
        mean = math.fsum(gains) / num_seen
        if num_seen == self._num_segments:
            return mean > 0
        if num_seen < 2:
            return None
        variance = math.fsum((gain - mean) ** 2 for gain in gains) / (num_seen - 1)
        if variance == 0:
            return None  # a handful of equal answers says nothing of the next one
        unseen_share = 1 - num_seen / self._num_segments
        margin = student_t(1 - self._error / 2, num_seen - 1) * math.sqrt(variance / num_seen * unseen_share)
        return mean > 0 if abs(mean) > margin else None
