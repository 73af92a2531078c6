"""Multiple-choice knapsack: one option of every class, the highest total value within a total cost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Knapsack:
    """The solutions of every capacity up to `capacity`.

    Attributes:
        unit: Cost of one step of the discretised capacity.
        least: Cost of the cheapest choice of every class: no solution costs less.
        choices: [classes, steps + 1]: a class's option, by the steps left for it and the classes before.
        steps: [classes] of each option's cost above its class's cheapest, in steps.
    """

    capacity: float
    unit: float
    least: float
    choices: NDArray[np.int16]
    steps: tuple[NDArray[np.int64], ...]

    def solution(self, capacity: float) -> tuple[int, ...] | None:
        """The option of each class that together are worth most within `capacity`; None if nothing fits."""
        left = int(np.floor((capacity - self.least) / self.unit + 1e-9))
        if left < 0:
            return None
        left = min(left, self.choices.shape[1] - 1)
        chosen = []
        for choice, steps in zip(self.choices[::-1], self.steps[::-1], strict=True):
            option = int(choice[left])
            chosen.append(option)
            left -= int(steps[option])
        return tuple(reversed(chosen))


def solve_knapsack(
    costs: Sequence[FloatArray], values: Sequence[FloatArray], *, capacity: float, num_steps: int = 4096
) -> Knapsack:
    """Solve for all capacities up to `capacity` by dynamic programming over discretised cost.

    Costs above each class's cheapest option are rounded *up* to 1 / `num_steps` of what the capacity leaves, so a
    solution never costs more than it may; it is exact for the rounded costs (hence for costs that are multiples of a
    step), and with C classes it leaves at most C steps unused. Of solutions worth the same, cheaper options win.

    Args:
        costs: Cost of each option of each class.
        values: Value of each option of each class.
        capacity: Largest total cost.
        num_steps: Steps of the discretisation.
    """
    least = float(sum(float(cost.min()) for cost in costs))
    room = max(capacity - least, 0.0)
    unit = room / num_steps if room else 1.0
    num_steps = num_steps if room else 0
    best = np.zeros(num_steps + 1)
    choices = np.zeros((len(costs), num_steps + 1), dtype=np.int16)
    all_steps = []
    for i, (cost, value) in enumerate(zip(costs, values, strict=True)):
        steps = np.ceil((cost - cost.min()) / unit - 1e-9).astype(np.int64)
        all_steps.append(steps)
        reached = np.full(num_steps + 1, -np.inf)
        for option in np.argsort(steps, kind="stable"):
            step = int(steps[option])
            if step > num_steps:
                break
            trial = best[: num_steps + 1 - step] + value[option]
            better = trial > reached[step:]
            reached[step:][better] = trial[better]
            choices[i, step:][better] = option
        best = reached
    return Knapsack(capacity=capacity, unit=unit, least=least, choices=choices, steps=tuple(all_steps))
