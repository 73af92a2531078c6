"""What a search looks at and what it answers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

from amoeba_export.ir import (
    NO_LIMITS,
    Architecture,
    Budget,
    DenseArchitecture,
    Latency,
    Policy,
    RuntimeLimits,
    Shape,
    Strategy,
    SubnetPlan,
)
from amoeba_export.ir.derive import PLAIN, CutRules
from amoeba_export.ir.metric import Mode, mode_of
from amoeba_export.search.surface import Quality

Space = Literal["grid", "layers"]
"""`grid`: depth x width, as in the paper. `layers`: heads and neurons of each layer on their own."""


Memory = Callable[[DenseArchitecture], float]
"""What a model occupies while it runs, in MiB."""


CALIBRATE_SMALLER = "calibrate with more removed layers or smaller widths"
"""What to do for smaller shapes than a strategy knows."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """What is to be chosen, and under which limits.

    Attributes:
        strategy: What to keep at each shape, and the quality of some shapes.
        architecture: The supernet.
        budgets: All of them hold for a candidate that fits. The first one is the one that is reported.
        space: `grid` or `layers`; None means `layers` for the adaptive policy and `grid` for the uniform one. `layers`
            contains the grid that the strategy's quality was measured on, so its choice is never worse on the same
            estimate. An upstream import has no importances, hence its grid only.
        rules: How a `grid` cuts a width; `layers` keeps its `align` and `gate_widths`.
        head_tokens: Tokens that plans compute logits of; None for all.
        memory_mb: What a model occupies.
        memory_limit_mb: How much it may.
        dtype: The precision, where several are searched: messages name it.
        runtime: What the target's runtime loads; nothing else is chosen.
        runtime_dtype: The precision, for `runtime`.
        smaller: What to do for smaller shapes than the strategy has figures of.
    """

    strategy: Strategy
    architecture: Architecture
    budgets: tuple[Budget, ...]
    space: Space | None = None
    rules: CutRules = PLAIN
    head_tokens: tuple[int, ...] | None = None
    memory_mb: Memory | None = None
    memory_limit_mb: float | None = None
    dtype: str | None = None
    runtime: RuntimeLimits = NO_LIMITS
    runtime_dtype: str | None = None
    smaller: str = CALIBRATE_SMALLER


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """What was measured in a run, and what follows for its next search.

    Attributes:
        full: Latency of the full model that relative budgets refer to; the prediction of the uncut one when None.
        measured: Models that were measured in the precision that is searched; predictions are corrected by them.
        refused: Models that do not count as within the limits, whatever was measured of them.
        margin: The share of a limit that predictions stay away from it. What was measured need not.
    """

    full: Latency | None = None
    measured: tuple[tuple[DenseArchitecture, Latency], ...] = ()
    refused: tuple[DenseArchitecture, ...] = ()
    margin: float = 0.0


NOTHING_SEEN = Seen()


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What a candidate must meet.

    Attributes:
        budgets: Every budget with its limit in milliseconds.
        margin: The share of a latency limit that a prediction stays away from it.
        memory_mb, memory_limit_mb: What a model occupies and may, if both are known.
    """

    budgets: tuple[tuple[Budget, float], ...]
    margin: float = 0.0
    memory_mb: Memory | None = None
    memory_limit_mb: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Sketch:
    """A possible subnet before its latency is looked at.

    Attributes:
        make_plan: Derives the plan; sketches are many and plans are large, so only the chosen one is made.
    """

    shape: Shape
    policy: Policy
    dense: DenseArchitecture = field(repr=False)
    quality: Quality
    make_plan: Callable[[], SubnetPlan] = field(repr=False, compare=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """A possible subnet with what is known of it.

    Attributes:
        shape: Depth and width; in the `layers` space the width is the kept share of the layers' weights.
        predicted_ms: The first budget's metric at its percentile, corrected by what was measured.
        uncertainty: Relative half-width of `predicted_ms`; 0 for a measured model.
        decode_ms, prefill_ms, e2e_ms: Medians.
        memory_mb: What it occupies while it runs, or None when nobody asked.
        fits: Whether it meets every budget and the memory limit, and was not refused.
        on_pareto: Whether no other candidate is at least as good, as fast and as small, and better in one of these.
    """

    shape: Shape
    policy: Policy
    dense: DenseArchitecture = field(repr=False)
    quality: Quality
    predicted_ms: float
    uncertainty: float
    decode_ms: float
    prefill_ms: float
    e2e_ms: float
    memory_mb: float | None
    fits: bool
    on_pareto: bool
    make_plan: Callable[[], SubnetPlan] = field(repr=False, compare=False)

    def to_json(self) -> dict[str, Any]:
        """One row of `amoeba search --json`. Rounded, so that the last bit of a machine's arithmetic does not show."""
        return {
            "shape": str(self.shape),
            "policy": self.policy,
            "predicted_ms": round(self.predicted_ms, 6),
            "uncertainty": round(self.uncertainty, 6),
            "decode_ms": round(self.decode_ms, 6),
            "prefill_ms": round(self.prefill_ms, 6),
            "e2e_ms": round(self.e2e_ms, 6),
            "memory_mb": None if self.memory_mb is None else round(self.memory_mb, 3),
            "quality": round(self.quality.value, 6),
            "quality_source": self.quality.source,
            "fits": self.fits,
            "on_pareto": self.on_pareto,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchResult:
    """All candidates, ranked, with at least one that fits.

    Attributes:
        candidates: Those that fit, best quality first (ties: the faster one); then the others, fastest first.
        limits: Each budget with its limit in milliseconds.
        quality_metric: What the candidates' quality is.
    """

    candidates: tuple[Candidate, ...]
    limits: tuple[tuple[Budget, float], ...]
    quality_metric: str

    @property
    def mode(self) -> Mode:
        """Which qualities are the better ones."""
        return mode_of(self.quality_metric)

    @property
    def best(self) -> Candidate:
        """The choice."""
        return self.candidates[0]

    @property
    def pareto(self) -> tuple[Candidate, ...]:
        """The candidates on the Pareto front, fastest first."""
        front = (candidate for candidate in self.candidates if candidate.on_pareto)
        return tuple(sorted(front, key=lambda candidate: candidate.predicted_ms))

    def to_json(self) -> dict[str, Any]:
        """The answer of `amoeba search --json`."""
        return {
            "limits": [
                {"metric": budget.metric, "percentile": budget.percentile, "limit_ms": round(limit_ms, 6)}
                for budget, limit_ms in self.limits
            ],
            "quality_metric": self.quality_metric,
            "best": self.best.to_json(),
            "candidates": [candidate.to_json() for candidate in self.candidates],
        }
