"""Student's t: how wide an interval is whose scatter is itself an estimate."""

from __future__ import annotations

import math
from functools import cache


@cache
def student_t(probability: float, degrees: int) -> float:
    """Quantile of Student's t, by bisection on its distribution for whole degrees (Abramowitz and Stegun 26.7.3-4).

    Own code because scipy would be a 100 MB dependency for this one function.
    """
    low, high = 0.0, 1e6
    for _ in range(100):
        middle = (low + high) / 2
        if _distribution(middle, degrees) < probability:
            low = middle
        else:
            high = middle
    return high


def _distribution(t: float, degrees: int) -> float:
    """P(T <= t) for t >= 0."""
    angle = math.atan2(t, math.sqrt(degrees))
    cos2 = math.cos(angle) ** 2
    term = total = 1.0 if degrees % 2 == 0 else math.cos(angle)
    for k in range(1 + degrees % 2, degrees - 1, 2):
        term *= cos2 * k / (k + 1)
        total += term
    if degrees % 2 == 0:
        return 0.5 + math.sin(angle) * total / 2
    if degrees == 1:
        return 0.5 + angle / math.pi
    return 0.5 + (angle + math.sin(angle) * total) / math.pi
