"""Two models that were measured in turns: how much slower is one, and how sure is that?

A machine drifts, and both drift with it. So each round gives one ratio. A machine is also disturbed now and then, and
a mean would carry such a round along: so the ratio is the Hodges-Lehmann estimate (the median of the averages of all
pairs of rounds, on a logarithmic scale), and its interval is that of Wilcoxon's signed ranks (Hollander, Wolfe, Chicken
2014, 3.2 and 3.3). It takes for granted that ratios scatter symmetrically, not that they are normal.

Fewer than five rounds have no such interval. What they show beyond doubt is a verdict all the same (`early_verdict`).
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Literal

from amoeba_export.student_t import student_t

ONE_SIDED = 0.05
"""How often chance alone puts the true ratio beyond one end of an interval."""

EARLY_ONE_SIDED = 0.005
"""The same of an early verdict: it is one more look at rounds that go on if it decides nothing."""

EARLY_DISTANCE = 0.05
"""How far from a limit such a verdict has to be at least: three rounds may agree by chance."""

Verdict = Literal["slower", "not slower", "undecided"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """Time of a model over that of its baseline.

    Attributes:
        ratio: That of a typical round.
        low: Lower end of its 90 % interval; 0 with fewer than five rounds.
        high: Upper end; infinite with fewer than five rounds.
        rounds: How many rounds there were.
    """

    ratio: float
    low: float
    high: float
    rounds: int

    def __str__(self) -> str:
        if self.low == self.high:
            return f"{self.ratio:.3f}"
        if not math.isfinite(self.high):
            return f"{self.ratio:.3f} (too few rounds for an interval)"
        return f"{self.ratio:.3f} ({self.low:.3f} to {self.high:.3f})"

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
    averages = sorted((logs[i] + logs[k]) / 2 for i in range(len(logs)) for k in range(i + 1))
    ratio = math.exp(statistics.median(averages))
    outside = _averages_outside(len(logs))
    if outside is None:
        return Comparison(ratio=ratio, low=0.0, high=math.inf, rounds=len(logs))
    low, high = averages[outside], averages[-1 - outside]
    return Comparison(ratio=ratio, low=math.exp(low), high=math.exp(high), rounds=len(logs))


def early_verdict(model_ms: Sequence[float], baseline_ms: Sequence[float]) -> Verdict:
    """What a few rounds show beyond doubt: whether the model is slower than its baseline.

    It is decided where the 99 % interval by Student's t, which takes for granted that the logarithms of the ratios are
    normal, leaves out 1 and their mean is `EARLY_DISTANCE` from it. A disturbed round widens the interval.
    """
    logs = [math.log(ours / theirs) for ours, theirs in zip(model_ms, baseline_ms, strict=True)]
    if len(logs) < 2:
        return "undecided"
    mean, standard_error = statistics.fmean(logs), statistics.stdev(logs) / math.sqrt(len(logs))
    half_width = student_t(1 - EARLY_ONE_SIDED, len(logs) - 1) * standard_error
    if abs(mean) < max(half_width, math.log1p(EARLY_DISTANCE)):
        return "undecided"
    return "slower" if mean > 0 else "not slower"


@cache
def _averages_outside(num_rounds: int) -> int | None:
    """How many of the sorted averages lie beyond each end of the interval; None with too few rounds for one.

    As many as the largest rank sum that chance stays at or below in 5 % of the cases, the sum of those of the ranks
    1..n whose sign is negative when every sign is a fair coin.
    """
    ways = [1]
    for rank in range(1, num_rounds + 1):
        longer = ways + [0] * rank
        for total, count in enumerate(ways):
            longer[total + rank] += count
        ways = longer
    outside, below = None, 0
    for total, count in enumerate(ways):
        below += count
        if below > ONE_SIDED * 2**num_rounds:
            break
        outside = total
    return outside
