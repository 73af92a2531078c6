"""Two models that were measured in turns: how much slower is one, and how sure is that?

A machine drifts, and both drift with it. So each round gives one ratio, and the interval is that of the mean of their
logarithms (Student's t): each of its ends is passed by chance in 5 % of the cases. A disturbed round makes it wider.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from amoeba_export.profile.fit import student_t95

Verdict = Literal["slower", "not slower", "undecided"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """Time of a model over that of its baseline.

    Attributes:
        ratio: Geometric mean of the rounds' ratios.
        low: Lower end of its 90 % interval; 0 with fewer than three rounds.
        high: Upper end; infinite with fewer than three rounds.
        rounds: How many rounds there were.
    """

    ratio: float
    low: float
    high: float
    rounds: int

    def verdict(self, margin: float) -> Verdict:
        """Whether it is slower by more than `margin` (0.03 is 3 %): decided only where the whole interval says so."""
        if self.low > 1 + margin:
            return "slower"
        return "not slower" if self.high <= 1 + margin else "undecided"

    def rounds_to_decide(self, margin: float) -> int | None:
        """About how many rounds would narrow the interval down to one side of `margin`; None without a guess."""
        distance = abs(math.log(self.ratio) - math.log1p(margin))
        if not math.isfinite(self.high) or distance == 0:
            return None
        half_width = math.log(self.high / self.ratio)
        return max(self.rounds + 1, math.ceil(self.rounds * (half_width / distance) ** 2))


def compare_rounds(model_ms: Sequence[float], baseline_ms: Sequence[float]) -> Comparison:
    """Compare the times of two models, one per round and in the same order."""
    logs = [math.log(ours / theirs) for ours, theirs in zip(model_ms, baseline_ms, strict=True)]
    centre, num_rounds = statistics.fmean(logs), len(logs)
    if num_rounds < 3:
        return Comparison(ratio=math.exp(centre), low=0.0, high=math.inf, rounds=num_rounds)
    half_width = student_t95(num_rounds - 1) * statistics.stdev(logs) / math.sqrt(num_rounds)
    return Comparison(
        ratio=math.exp(centre), low=math.exp(centre - half_width), high=math.exp(centre + half_width), rounds=num_rounds
    )
