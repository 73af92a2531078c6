"""What a run shows of a subnet and its budgets: the subnet and the full model, measured in turns."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from amoeba_export.application.costs import MOST_ROUNDS
from amoeba_export.ir import Budget, Latency, Progress
from amoeba_export.profile import Comparison, compare_rounds, early_verdict

SURPRISE = 0.1
"""Of the expected time: what is measured to be further from it is measured again."""

AGREEMENT = 0.05
"""Two runs that differ by more of the time do not confirm each other."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """A subnet's latency beside that of the full model, in the light of budgets.

    Attributes:
        budgets: A share of the full model is a share of `full`. What is said of budgets needs one.
        full: Latency of the full model, from the same run.
        latency: Latency of the subnet.
    """

    budgets: tuple[Budget, ...]
    full: Latency
    latency: Latency

    @property
    def limit_ms(self) -> float:
        """Of the first budget, in milliseconds."""
        return self.budgets[0].limit_beside(self.full)

    @property
    def reached_ms(self) -> float:
        """What the first budget is about, in milliseconds."""
        return self.budgets[0].of(self.latency)

    @property
    def use(self) -> float:
        """Share that it takes of the budget that it takes most of: up to 1, they seem to be kept."""
        return max(budget.use(self.latency, self.full) for budget in self.budgets)

    @property
    def tightest(self) -> tuple[Budget, float, float]:
        """The budget that it takes most of, its limit and what was reached, both in milliseconds."""
        budget = max(self.budgets, key=lambda budget: budget.use(self.latency, self.full))
        return budget, budget.limit_beside(self.full), budget.of(self.latency)

    @property
    def is_kept(self) -> bool:
        """Whether the rounds show that every budget is kept. Medians are believed where there is no interval."""
        return self.use <= 1 and all(
            comparison.verdict(0.0) == "not slower"
            for comparison in self._comparisons()
            if math.isfinite(comparison.high)
        )

    @property
    def is_decided(self) -> bool:
        """Whether the rounds show that every budget is kept, or that one is not; without any, nothing can be.

        Rounds that are too few for an interval have to show it beyond doubt.
        """
        verdicts = {
            comparison.verdict(0.0) if math.isfinite(comparison.high) else early_verdict(ours, limits)
            for comparison, (ours, limits) in zip(self._comparisons(), self._pairs(), strict=True)
        }
        return "slower" in verdicts or "undecided" not in verdicts

    @property
    def has_interval(self) -> bool:
        """Whether there are enough rounds for one, or none at all: no more of them would give any."""
        return all(math.isfinite(comparison.high) for comparison in self._comparisons())

    @property
    def doubt(self) -> float:
        """How far below a budget a subnet must be to be shown to keep it in `MOST_ROUNDS` rounds that scatter so.

        A share of the budget. An interval narrows with the square root of the number of rounds; 0 without one.
        """
        doubts = [0.0]
        for comparison in self._comparisons():
            if math.isfinite(comparison.high):
                half_width = math.log(comparison.high / comparison.ratio)
                doubts.append(1 - math.exp(-half_width * math.sqrt(comparison.rounds / MOST_ROUNDS)))
        return max(doubts)

    def _comparisons(self) -> list[Comparison]:
        """The subnet with each budget."""
        return [compare_rounds(ours, limits) for ours, limits in self._pairs()]

    def _pairs(self) -> list[tuple[list[float], list[float]]]:
        """For each budget the subnet's rounds, and what each allows, in milliseconds.

        None where a backend keeps no rounds, or unequal numbers.
        """
        if not self.latency.rounds or len(self.latency.rounds) != len(self.full.rounds):
            return []
        return [
            (_rounds_ms(self.latency, budget), [budget.resolve(ms) for ms in _rounds_ms(self.full, budget)])
            for budget in self.budgets
        ]


def _rounds_ms(latency: Latency, budget: Budget) -> list[float]:
    """What the budget is about, in each round. For p90, a round's median times the tail that all have in common."""
    tail = budget.of(latency) / latency.of(budget.metric)
    return [ms * tail for ms in latency.rounds_of(budget.metric)]


def sure(measure: Callable[[], Outcome], *, expected_use: float, progress: Progress) -> Outcome:
    """What was measured. A surprise is measured again, and a third time where the two differ; the median is taken.

    All rounds of a run share what the device does besides, so they may agree and be wrong, and the next choice rests on
    them. Of two that agree, the slower one is taken.

    Args:
        measure: Starts a run.
        expected_use: Share of the first budget that the subnet is expected to take.
        progress: Told of another run.
    """
    first = measure()
    is_clear = max(_use(first), expected_use) < 1 - SURPRISE  # a model that fits easily: nothing depends on its time
    if is_clear or abs(_use(first) / expected_use - 1) <= SURPRISE:
        return first
    expected_ms = expected_use * first.limit_ms
    progress.note(f"It takes {first.reached_ms:.4g} ms, and {expected_ms:.4g} ms were expected: measuring again.")
    runs = [first, measure()]
    if abs(_use(runs[1]) / _use(first) - 1) > AGREEMENT:
        runs.append(measure())
    return sorted(runs, key=_use)[1]


def _use(outcome: Outcome) -> float:
    """Share of the first budget."""
    return outcome.reached_ms / outcome.limit_ms
