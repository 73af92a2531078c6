from __future__ import annotations

from itertools import product

import numpy as np
import pytest

from amoeba_export.search import pareto_front
from amoeba_export.search.knapsack import solve_knapsack


def _by_brute_force(costs: list[np.ndarray], values: list[np.ndarray], capacity: float) -> float:
    best = -np.inf
    for chosen in product(*(range(len(cost)) for cost in costs)):
        if sum(cost[i] for cost, i in zip(costs, chosen, strict=True)) <= capacity + 1e-9:
            best = max(best, sum(value[i] for value, i in zip(values, chosen, strict=True)))
    return float(best)


@pytest.mark.parametrize("seed", range(25))
def test_whole_costs_are_solved_exactly_at_every_capacity(seed: int) -> None:
    rng = np.random.default_rng(seed)
    costs = [rng.integers(0, 12, size=rng.integers(1, 5)).astype(float) for _ in range(5)]
    values = [rng.random(len(cost)) for cost in costs]
    least = int(sum(cost.min() for cost in costs))
    solved = solve_knapsack(costs, values, capacity=least + 20.0, num_steps=20)
    for capacity in range(least, least + 21):
        chosen = solved.solution(float(capacity))
        assert chosen is not None
        assert sum(cost[i] for cost, i in zip(costs, chosen, strict=True)) <= capacity
        value = sum(value[i] for value, i in zip(values, chosen, strict=True))
        assert value == pytest.approx(_by_brute_force(costs, values, capacity))


@pytest.mark.parametrize("seed", range(10))
def test_other_costs_are_rounded_up_by_at_most_a_step_per_class(seed: int) -> None:
    rng = np.random.default_rng(seed)
    costs = [rng.random(4) for _ in range(6)]
    values = [np.sort(rng.random(4)) for _ in range(6)]
    chosen = solve_knapsack(costs, values, capacity=3.0, num_steps=500).solution(3.0)
    assert chosen is not None
    assert sum(cost[i] for cost, i in zip(costs, chosen, strict=True)) <= 3.0
    value = sum(value[i] for value, i in zip(values, chosen, strict=True))
    room = 3.0 - sum(cost.min() for cost in costs)
    assert value >= _by_brute_force(costs, values, 3.0 - 6 * room / 500) - 1e-12


def test_nothing_fits() -> None:
    costs, values = [np.array([1.0, 2.0])], [np.array([0.0, 1.0])]
    solved = solve_knapsack(costs, values, capacity=0.5)
    assert solved.solution(0.5) is None
    assert solve_knapsack(costs, values, capacity=1.0).solution(1.0) == (0,)


def test_of_equal_values_the_cheaper_option_wins() -> None:
    assert solve_knapsack([np.array([3.0, 1.0, 2.0])], [np.ones(3)], capacity=5.0).solution(5.0) == (1,)


@pytest.mark.parametrize("seed", range(5))
def test_pareto_front_is_what_nothing_dominates(seed: int) -> None:
    points = np.random.default_rng(seed).integers(0, 6, size=(40, 3)).tolist()

    def dominates(a: list[int], b: list[int]) -> bool:
        return all(x <= y for x, y in zip(a, b, strict=True)) and a != b

    expected = [i for i, b in enumerate(points) if not any(dominates(a, b) for a in points)]
    assert pareto_front(points) == expected


def test_pareto_front_of_nothing() -> None:
    assert pareto_front([]) == []
