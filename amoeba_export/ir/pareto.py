"""Which candidates no other candidate beats in everything."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def pareto_front(objectives: Sequence[Sequence[float]]) -> list[int]:
    """Positions of the points that no other point dominates; smaller is better in every objective.

    A point dominates another if it is nowhere worse and somewhere better. Of equal points, all stay.

    Args:
        objectives: One row per point, all of the same length.
    """
    if not objectives:
        return []
    points = np.asarray(objectives, dtype=np.float64)
    front = []
    for i, point in enumerate(points):
        nowhere_worse = (points <= point).all(axis=1)
        somewhere_better = (points < point).any(axis=1)
        if not (nowhere_worse & somewhere_better).any():
            front.append(i)
    return front
