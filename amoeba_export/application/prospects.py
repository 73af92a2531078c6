"""What shapes are worth once their weights are refitted: measured for a few of them, predicted for the others.

The loss of a candidate is a sum: the full model's, the rise by its cut, and the rise by rounding. A refit leaves a
share of the rise by the cut. The share is measured at the shortlist, by a quick refit and its held-out loss; between
measured depths its logarithm is taken to be linear. Losses are in nats per token.

What is shipped may be healed as well. No heal is tried for a choice: it is expected to leave `HEAL_SHARE` of each rise.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from amoeba_export.application.refits import heals, is_worse, refitted, rise_by, rise_with
from amoeba_export.application.session import Session
from amoeba_export.ir import Refit, Shape, Strategy
from amoeba_export.ir.metric import after_rise, nats
from amoeba_export.refit import SHORTLIST_RECIPE
from amoeba_export.search import Candidate, Quality, SearchResult, quality_surface

MOST_REFITS = 5
"""Shapes of a shortlist. They are refitted in one pass of the full model."""

BEST_SHARE = 0.15
"""Assumed to be the least share of a rise that a refit leaves: a guess. What cannot win with it is not refitted."""

HEAL_SHARE = 0.7
"""What a heal leaves of the rise that a refit left: 0.64 and 0.76 at 23x0.875 of SmolLM2-135M (docs/RESULTS.md)."""

WITHIN = 0.5
"""Nats that a shape may be expected behind the best one, and still be refitted."""

LEAST_RISE = 1e-3
"""Of a cut, in nats: shares of less are noise."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Searched:
    """One precision that may be chosen.

    Attributes:
        dtype: Its name.
        rise: Rise of the loss by rounding.
        search: What there is in it, before any refit.
    """

    dtype: str
    rise: float
    search: SearchResult

    def lines(self, full: float) -> list[Line]:
        """The best cut of each depth that fits. `full` is the quality of the full model."""
        metric = self.search.quality_metric
        base, best = nats(metric, full), dict[int, Candidate]()
        for candidate in self.search.candidates:
            if candidate.fits and candidate.dense != candidate.dense.base.uncut:
                best.setdefault(candidate.shape.depth, candidate)  # they come best first
        found = []
        for candidate in best.values():
            cut = nats(metric, candidate.quality.value) - base
            found.append(
                Line(
                    option=self,
                    candidate=candidate,
                    as_cut=base + cut + self.rise,
                    expected=base + usual_share(candidate.shape) * cut + self.rise,
                    at_best=base + BEST_SHARE * cut + self.rise,
                )
            )
        return found


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """The best cut of one depth in one precision. Losses are after rounding: without a refit, and with one."""

    option: Searched
    candidate: Candidate
    as_cut: float
    expected: float
    at_best: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """A shape that was refitted.

    Attributes:
        dtype: Whose search it was taken from; a refit is the same for all.
        shape: Its depth and width.
        cut: Rise of the loss by the cut alone, as the strategy has it.
        rise: Rise of the held-out loss after the refit, mean over the texts, and after the heal where there is one.
    """

    dtype: str
    shape: Shape
    cut: float
    rise: float

    @property
    def share(self) -> float:
        """What the refit left of the rise."""
        return max(self.rise, LEAST_RISE) / max(self.cut, LEAST_RISE)


@dataclass(frozen=True, kw_only=True)
class Prospects:
    """What refits leave of the rises by cuts.

    Attributes:
        measured: At least one.
    """

    measured: tuple[Measured, ...]

    @property
    def error(self) -> float | None:
        """Mean error of a predicted loss: each measured one predicted from the others. None with fewer than three."""
        if len({one.shape.depth for one in self.measured}) < 3:
            return None
        errors = []
        for one in self.measured:
            others = [other for other in self.measured if other.shape.depth != one.shape.depth]
            errors.append(abs(_interpolated(others, one.shape.depth) * one.cut - one.rise))
        return fmean(errors)

    def loss(self, dtype: str, depth: int, cut: float) -> float:
        """Predicted rise after a refit of a cut whose rise is `cut`: of depths that were not measured, with its error.

        So a shape that was not measured is chosen only where it wins by more than that.
        """
        if cut < LEAST_RISE:
            return cut
        here = [one for one in self.measured if one.shape.depth == depth]
        own = [one for one in here if one.dtype == dtype]
        if here:
            nearest = min(own or here, key=lambda one: abs(math.log(max(one.cut, LEAST_RISE) / cut)))
            return min(cut, nearest.share * cut)
        error = self.error
        return cut if error is None else min(cut, _interpolated(self.measured, depth) * cut + error)

    def strategy(self, prior: Strategy, dtype: str) -> Strategy:
        """`prior`, from `densified`, whose quality is that of refitted shapes. It selects what it selected."""
        full = prior.quality[Shape(prior.num_layers, 1.0)]
        quality = {}
        for shape, value in prior.quality.items():
            cut = nats(prior.quality_metric, value) - nats(prior.quality_metric, full)
            rise = self.loss(dtype, shape.depth, cut)
            quality[shape] = after_rise(prior.quality_metric, full, rise)
        return dataclasses.replace(prior, quality=quality)

    def told(self, result: SearchResult) -> SearchResult:
        """A search whose candidates say whether their quality was measured of a refitted shape or predicted."""
        shapes = {one.shape for one in self.measured}

        def named(candidate: Candidate) -> Candidate:
            source = candidate.quality.source
            if candidate.dense != candidate.dense.base.uncut:
                source = "refitted" if candidate.shape in shapes else "predicted"
            return dataclasses.replace(candidate, quality=Quality(candidate.quality.value, source))

        return dataclasses.replace(result, candidates=tuple(map(named, result.candidates)))


def weighs_refits(strategy: Strategy) -> bool:
    """Whether the strategy's figures are losses of shapes, the full model's among them."""
    return strategy.quality_metric in ("loss", "perplexity") and Shape(strategy.num_layers, 1.0) in strategy.quality


def densified(strategy: Strategy) -> Strategy:
    """The same with a quality for every depth at every width of its grid, so that each depth can be scaled alone."""
    surface = quality_surface(strategy)
    widths = sorted({shape.width for shape in strategy.quality})
    quality = dict(strategy.quality)
    for removed in strategy.depth:
        depth = strategy.num_layers - removed
        if depth in surface.rows:
            continue
        for width in widths:
            known = surface.at(depth, width)
            if known is not None:
                quality[Shape(depth, width)] = known.value
    return dataclasses.replace(strategy, quality=quality)


def usual_strategy(strategy: Strategy) -> Strategy:
    """The same with what a refit usually leaves of each rise: to see which shapes are worth a refit."""
    metric, full = strategy.quality_metric, strategy.quality[Shape(strategy.num_layers, 1.0)]
    base = nats(metric, full)
    quality = {
        shape: after_rise(metric, full, usual_share(shape) * (nats(metric, value) - base))
        if shape != Shape(strategy.num_layers, 1.0)
        else value
        for shape, value in strategy.quality.items()
    }
    return dataclasses.replace(strategy, quality=quality)


def shortlist(options: Sequence[Searched], full: float, *, to_beat: float | None) -> list[tuple[Searched, Candidate]]:
    """What to refit: of each precision, the best of distinct depths that may be the best of all.

    The candidate that is best without refits is among them, so the choice is never worse than that one refitted.

    Args:
        options: Each with its search over what `densified` made.
        full: Quality of the full model.
        to_beat: Loss of the best whole model that fits; nothing that cannot beat it is listed. None without one.
    """
    lines = [line for option in options for line in option.lines(full)]
    ranked = sorted(
        (line for line in lines if to_beat is None or line.at_best < to_beat), key=lambda line: line.expected
    )
    if not ranked:
        return []
    chosen = [min(ranked, key=lambda line: line.as_cut)]
    spacing = 1 if len(ranked) <= MOST_REFITS else 2
    for line in ranked:
        is_near = any(
            line.option is other.option and abs(line.candidate.shape.depth - other.candidate.shape.depth) < spacing
            for other in chosen
        )
        if len(chosen) < MOST_REFITS and not is_near and line.expected <= ranked[0].expected + WITHIN:
            chosen.append(line)
    return [(line.option, line.candidate) for line in chosen]


def at_best(metric: str, value: float, full: float) -> float:
    """Loss of a cut whose quality is `value` before a refit, after the best refit that there may be."""
    return nats(metric, full) + BEST_SHARE * (nats(metric, value) - nats(metric, full))


def usual_share(shape: Shape) -> float:
    """A guess of what a refit leaves of a cut's rise, less where width was cut. It only decides what is measured.

    Quick refits of 15 cuts of SmolLM2-135M and Gemma 3 270M left 0.44 to 0.74, those of widths from 0.51 to 0.7 between
    0.51 and 0.65 (dev/LOG.md). For narrow shapes the guess is low on purpose: they get their chance.
    """
    return 0.6 * math.exp(-0.5 * (1 - shape.width))


def measure_prospects(session: Session, chosen: Sequence[tuple[Searched, Candidate]], full: float) -> Prospects:
    """Refit the shortlist quickly, all of it in one pass of the full model, and look at its held-out losses.

    Where the export heals its cut, the rises are those that the heal is expected to leave.

    Raises:
        InputError: The texts of the recipe cannot be used with this model.
    """
    plans = [candidate.make_plan() for _, candidate in chosen]
    names = ", ".join(dict.fromkeys(str(plan.shape) for plan in plans))
    session.progress.note(f"A refit changes which shape is best: refitting and comparing {names}.")
    distinct = {plan.geometry: plan for plan in plans}
    made, named = refitted(session, list(distinct.values()), SHORTLIST_RECIPE)
    share = HEAL_SHARE if heals(session) else 1.0
    rises = {plan.geometry: share * rise_after_refit(made.supernet.refits[plan.refit_id or ""]) for plan in named}
    prospects = Prospects(
        measured=tuple(
            Measured(
                dtype=option.dtype,
                shape=candidate.shape,
                cut=nats(option.search.quality_metric, candidate.quality.value)
                - nats(option.search.quality_metric, full),
                rise=rises[plan.geometry],
            )
            for (option, candidate), plan in zip(chosen, plans, strict=True)
        )
    )
    if heals(session):
        session.progress.note(f"A heal is expected to leave {HEAL_SHARE:g} of these rises.")
    if prospects.error is not None:
        session.progress.note(
            f"Losses of other refitted shapes are predicted from these, give or take {prospects.error:.2g} nats."
        )
    return prospects


def rise_after_refit(held: Refit) -> float:
    """Of the held-out loss over the full model's, mean over the texts, of what is shipped: a bad refit is not."""
    return rise_with(held) - (rise_by(held) if is_worse(held) else 0.0)


def _interpolated(measured: Sequence[Measured], depth: int) -> float:
    """The share at a depth: its logarithm is linear between the measured depths, and level outside."""
    by_depth: dict[int, list[float]] = {}
    for one in measured:
        by_depth.setdefault(one.shape.depth, []).append(math.log(one.share))
    logs: Mapping[int, float] = {known: fmean(values) for known, values in by_depth.items()}
    low = max((known for known in logs if known <= depth), default=min(logs))
    high = min((known for known in logs if known >= depth), default=max(logs))
    position = (depth - low) / (high - low) if high != low else 0.0
    return math.exp(logs[low] + position * (logs[high] - logs[low]))
