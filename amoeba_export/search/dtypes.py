"""Which precision to use, when several are possible: the one whose best candidate is best, rounding included."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from amoeba_export.errors import NothingFits, NothingLoads
from amoeba_export.ir import DenseArchitecture
from amoeba_export.ir.metric import after_rise, badness
from amoeba_export.search.grid import grid_sketches
from amoeba_export.search.space import Problem, SearchResult
from amoeba_export.search.surface import quality_surface

FASTER_THAN_ITS_SHARE = 0.8
"""A cut takes at least its share of the weights times the full model's time, and overheads besides. Small models lie
closer to the processor: so much faster than that is thought possible when a search is left out as hopeless."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Option:
    """One precision that may be searched.

    Attributes:
        rise: Of the loss by rounding, measured on the full model, in nats a token; never negative.
        bound: What the quality, rounding included, cannot be better than, as `badness`; infinite where nothing can fit.
        full_use: Largest share of a limit that the whole model takes.
        search: Searches it with its own cost model. Raises `NothingFits`.
    """

    dtype: str
    rise: float
    bound: float
    full_use: float
    search: Callable[[], SearchResult]


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """The best of one precision.

    Attributes:
        dtype: Its name.
        rise: Of the loss by rounding, in nats a token.
        search: What it is the best of.
    """

    dtype: str
    rise: float
    search: SearchResult

    @property
    def badness(self) -> float:
        """Quality of the choice, rounding included, such that smaller is better."""
        metric = self.search.quality_metric
        return badness(after_rise(metric, self.search.best.quality.value, self.rise), self.search.mode)


def search_precisions(options: Sequence[Option], known: Found | None = None) -> Found:
    """The best candidate of all precisions.

    A coarser precision is faster, so it affords a larger subnet; what it loses by rounding is added. Which of the two
    wins is not known beforehand. Those that may be best are searched first, and those that cannot be better than what
    was found are not searched: their cost tables are never measured.

    Args:
        options: Precisions, the preferred one first; it wins ties.
        known: A candidate that is known to fit, such as the whole model in one of the precisions.

    Raises:
        NothingFits: No precision has a candidate that fits; the error of the one that comes closest.
    """
    best = known
    failures: list[NothingFits | NothingLoads] = []
    hopeful = [option for option in options if option.bound < math.inf]
    if not hopeful and known is None:  # to say what comes closest
        hopeful = [min(options, key=lambda one: one.full_use)]
    for option in sorted(hopeful, key=lambda one: one.bound):
        if best is not None and option.bound >= best.badness:
            continue
        try:
            found = Found(dtype=option.dtype, rise=option.rise, search=option.search())
        except (NothingFits, NothingLoads) as error:
            failures.append(error)
            continue
        if best is None or found.badness < best.badness:
            best = found
    if best is None:
        assert failures, "there is no precision to choose from"
        raise min(failures, key=lambda error: error.load)
    return best


def least_badness(problem: Problem, full_use: float, rise: float = 0.0) -> float:
    """What no subnet of the problem can be better than, rounding included; infinite if none can fit.

    Args:
        problem: With a quality that is measured or calibrated.
        full_use: The largest share of any limit that the full model takes, above 1 where it does not fit.
        rise: Of the loss by rounding, in nats a token.
    """
    surface = quality_surface(problem.strategy)

    def rounded(value: float) -> float:
        return badness(after_rise(surface.metric, value, rise), surface.mode)

    if problem.rules.policy == "adaptive" or problem.space == "layers":
        return min((rounded(value) for value in problem.strategy.quality.values()), default=-1.0)
    sketches = grid_sketches(problem.strategy, problem.architecture, problem.rules)
    return min(
        (
            rounded(sketch.quality.value)
            for sketch in sketches
            if FASTER_THAN_ITS_SHARE * _share(sketch.dense) * full_use <= 1
        ),
        default=math.inf,
    )


def _share(dense: DenseArchitecture) -> float:
    """Of the prunable weights."""
    base = dense.base
    return sum(base.prunable_params(layer) for layer in dense.layers) / (base.num_layers * base.prunable_params())
