"""Choose shape and precision together: the whole model in a precision that fits, or the best subnet of any."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial

from amoeba_export.application.costs import make_predictor
from amoeba_export.application.loadable import say_cost
from amoeba_export.application.problem import Known, problem_of, smallest_known, whole_strategy
from amoeba_export.application.prospects import (
    WITHIN,
    Prospects,
    Searched,
    at_best,
    densified,
    measure_prospects,
    shortlist,
    weighs_refits,
)
from amoeba_export.application.selection import deeper, with_strategy
from amoeba_export.application.session import Session
from amoeba_export.application.trials import Choice, Trial, seen_in
from amoeba_export.application.wholes import Whole, chosen_with_data, measure_wholes
from amoeba_export.errors import InputError, NothingFits, NothingLoads
from amoeba_export.ir import DenseArchitecture, Shape, Strategy
from amoeba_export.ir.metric import nats
from amoeba_export.refit import OFF
from amoeba_export.search import (
    Found,
    Option,
    Predictor,
    Problem,
    SearchResult,
    Seen,
    least_badness,
    quality_surface,
    search_plan,
    search_precisions,
)

NEGLIGIBLE_RISE = 0.02
"""Nats per token that rounding may add to the loss of a whole model that fits: for so little no subnet is searched."""


@dataclass(frozen=True, slots=True)
class _Look:
    """What one choice goes by.

    Attributes:
        history: The trials so far.
        margin: Whether predictions stay away from limits.
    """

    history: Sequence[Trial]
    margin: bool


class Chooser:
    """Chooses again and again, given what was measured. Calibrates and profiles when a choice first needs it.

    Attributes:
        wholes: The uncut model in every precision that is known, the one that relative budgets refer to first.
        searches: The last search of each precision that was searched.
    """

    def __init__(self, session: Session) -> None:
        self._opened = session
        self._calibrated: Session | None = None
        self._may_deepen = True
        self._predictors: dict[str, Predictor] = {}
        self._prospects: Prospects | None = None
        self._has_compared = False
        self.searches: dict[str, SearchResult] = {}
        self._has_rounded = False
        self.wholes = measure_wholes(session, with_data=False)

    def __call__(self, history: Sequence[Trial] = ()) -> Choice:
        """The best candidate that fits every limit, by prediction and by what `history` shows.

        Raises:
            NothingFits: Not even without a margin.
        """
        failure: NothingFits | None = None
        for look in [_Look(history, margin) for margin in ([True, False] if self._opened.is_measured else [False])]:
            whole = self._best_whole(self._opened, look)
            if not self._is_decided(whole):
                # A finer precision that fits and loses next to nothing needs no such comparison, and no half a minute.
                self.wholes, self._has_rounded = chosen_with_data(self._opened, self.wholes), True
                whole = self._best_whole(self._opened, look)
            if whole is not None and whole.rise <= NEGLIGIBLE_RISE:
                return Choice(session=self._opened.in_dtype(whole.dtype), found=whole)
            try:
                return self._among_all(look)
            except NothingFits as error:
                failure = error
        assert failure is not None
        if self._deepened(history):
            return self(history)
        raise failure

    def name_of(self, choice: Choice) -> str:
        """How messages call it: its precision is said where there was a choice of one."""
        shape = str(choice.candidate.shape)
        if len(self._candidates) == 1:
            return shape
        whole = "the whole model" if choice.candidate.dense == choice.session.full else shape
        return f"{whole} in {choice.found.dtype}"

    def _best_whole(self, session: Session, look: _Look) -> Found | None:
        """The whole model in the best precision in which it fits: no cost table is needed."""
        for one in sorted(self._candidates, key=lambda one: one.rise):
            strategy, here = whole_strategy(session, one), session.in_dtype(one.dtype)
            seen = self._seen(one.dtype, look)
            # Under a share, as slow as the last run was.
            predictor = Known(seen.measured[0][1]) if session.is_measured else make_predictor(here)
            was_tried = any(trial.choice.key == (one.dtype, session.full) for trial in look.history)
            if not was_tried:  # its figures, of another run, are a prediction
                seen = dataclasses.replace(seen, measured=())
            with suppress(NothingFits, NothingLoads):
                result = search_plan(problem_of(here, strategy), predictor, seen)
                return Found(dtype=one.dtype, rise=one.rise, search=result)
        return None

    def _is_decided(self, whole: Found | None) -> bool:
        """Whether integers chosen with data would change nothing: not what is chosen, nor what is said of it."""
        if self._has_rounded:
            return True
        if whole is None or whole.rise > NEGLIGIBLE_RISE:
            return False
        return all(one.rounding is None or one.rounding.how is None for one in self.wholes if one.dtype == whole.dtype)

    def _among_all(self, look: _Look) -> Choice:
        """The best of all subnets and of the whole model, in all precisions."""
        session = self._calibrated = self._calibrated or with_strategy(self._opened)
        known = self._best_whole(session, look)
        strategies = self._strategies(session, known, look)
        options = []
        for one in self._weighed(session):
            strategy, here = strategies[one.dtype], session.in_dtype(one.dtype)
            problem = problem_of(here, strategy)
            full_use = self._use(one)
            options.append(
                Option(
                    dtype=one.dtype,
                    rise=one.rise,
                    bound=least_badness(problem, full_use, one.rise),
                    full_use=full_use,
                    search=partial(self._search, here, problem, look),
                )
            )
        found = search_precisions(options, known)
        return Choice(session=session.in_dtype(found.dtype), found=found)

    def _weighed(self, session: Session) -> list[Whole]:
        """The precisions that can be compared: what rounding costs is known as a loss."""
        candidates = self._candidates
        return candidates if quality_surface(session.strategy).metric in ("loss", "perplexity") else candidates[:1]

    def _search(self, session: Session, problem: Problem, look: _Look) -> SearchResult:
        """The session's precision, with its own cost table."""
        dtype, seen = session.dtype, self._seen(session.dtype, look)
        result = search_plan(problem, self._predictor(session), seen)
        if not look.history:
            say_cost(session, problem, self._predictor(session), seen, result)
        if not look.history and len(self._candidates) > 1:
            best, quality = result.best, f"{result.quality_metric} {result.best.quality.value:.4g} before rounding"
            session.progress.note(f"In {dtype}: {best.shape} at {best.predicted_ms:.4g} ms, {quality}.")
        self.searches[dtype] = self._prospects.told(result) if self._prospects else result
        return self.searches[dtype]

    def _predictor(self, session: Session) -> Predictor:
        """Of the session's precision: one for all choices."""
        if session.dtype not in self._predictors:
            self._predictors[session.dtype] = make_predictor(session)
        return self._predictors[session.dtype]

    def _strategies(self, session: Session, known: Found | None, look: _Look) -> dict[str, Strategy]:
        """The strategy of the session for each precision: with what shapes are worth once they are refitted.

        A shortlist is refitted once for each calibration. Where no cut can beat the whole model, nothing is.
        """
        prior, dtypes = session.strategy, [one.dtype for one in self._candidates]
        if self._opened.settings.refit == OFF or not weighs_refits(prior):
            return dict.fromkeys(dtypes, prior)
        prior = densified(prior)
        if not self._has_compared:
            self._prospects = self._compare(session, prior, known, look)
            self._has_compared = True
        if self._prospects is None:
            return dict.fromkeys(dtypes, prior)
        return {dtype: self._prospects.strategy(prior, dtype) for dtype in dtypes}

    def _compare(self, session: Session, prior: Strategy, known: Found | None, look: _Look) -> Prospects | None:
        """Refit the shortlist; None where there is none, or where the texts cannot be used with this model."""
        metric, full = prior.quality_metric, prior.quality[Shape(prior.num_layers, 1.0)]
        rises = {one.dtype: one.rise for one in self._candidates}
        to_beat = nats(metric, full) + rises[known.dtype] if known else None
        bounds = {}
        for one in self._candidates:
            problem = problem_of(session.in_dtype(one.dtype), prior)
            bounds[one.dtype] = at_best(metric, least_badness(problem, self._use(one)), full) + one.rise
        options: list[Searched] = []
        limit = math.inf if to_beat is None else to_beat
        for dtype, bound in sorted(bounds.items(), key=lambda item: item[1]):
            if bound >= limit:
                continue
            here = session.in_dtype(dtype)
            with suppress(NothingFits, NothingLoads):
                result = search_plan(problem_of(here, prior), self._predictor(here), self._seen(dtype, look))
                options.append(Searched(dtype=dtype, rise=rises[dtype], search=result))
                limit = min([limit, *(line.expected + WITHIN for line in options[-1].lines(full))])
        chosen = shortlist(options, full, to_beat=to_beat)
        if not chosen:
            return None
        try:
            return measure_prospects(session, chosen, full)
        except InputError as error:
            session.progress.note(f"Shapes are compared without a refit: {error.what}")
            return None

    def _deepened(self, history: Sequence[Trial]) -> bool:
        """Calibrate down to smaller subnets, once, if the smallest would fit. Whether there is more to choose now."""
        if not self._may_deepen or self._calibrated is None:
            return False
        self._may_deepen = False
        session = self._calibrated
        smallest = smallest_known(session)
        if smallest is None or not any(self._would_fit(smallest, dtype, history) for dtype in self._predictors):
            return False
        session.progress.note("No calibrated shape fits: calibrating deeper and narrower.")
        self._calibrated, self._has_compared, self._prospects = deeper(self._opened), False, None
        return self._calibrated is not None

    def _would_fit(self, dense: DenseArchitecture, dtype: str, history: Sequence[Trial]) -> bool:
        reference = self._seen(dtype, _Look(history, margin=False)).full
        assert reference
        return all(
            self._predictors[dtype].predict(dense, budget.metric, budget.percentile)[0]
            <= budget.limit_beside(reference)
            for budget in self._opened.settings.budgets
        )

    def _seen(self, dtype: str, look: _Look) -> Seen:
        latencies = {one.dtype: one.latency for one in self.wholes}
        relative = all(budget.fraction for budget in self._opened.settings.budgets)
        seen = seen_in(look.history, dtype, latencies, self._opened.full, relative=relative)
        if not self._opened.is_measured:
            seen = dataclasses.replace(seen, measured=())
        return seen if look.margin else dataclasses.replace(seen, margin=0.0)

    def _use(self, one: Whole) -> float:
        """The largest share of a latency budget that the whole model takes."""
        reference = self.wholes[0].latency
        return max(budget.use(one.latency, reference) for budget in self._opened.settings.budgets)

    @property
    def _candidates(self) -> list[Whole]:
        """Those whose precision may be chosen, the preferred one first."""
        return [one for one in self.wholes if one.dtype in self._opened.settings.dtypes]
