"""Choose shape and precision together: the whole model in a precision that fits, or the best subnet of any."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from contextlib import suppress
from functools import partial

from amoeba_export.application.costs import is_measured, make_predictor
from amoeba_export.application.loadable import say_cost
from amoeba_export.application.problem import Known, problem_of, smallest_known, whole_strategy, worse_by_rounding
from amoeba_export.application.selection import deeper, with_strategy
from amoeba_export.application.session import Session
from amoeba_export.application.trials import Choice, Trial, seen_in
from amoeba_export.application.wholes import Whole, measure_wholes
from amoeba_export.errors import NothingFits, NothingLoads
from amoeba_export.ir import DenseArchitecture
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


class Chooser:
    """Chooses again and again, given what was measured. Calibrates and profiles when a choice first needs it.

    Attributes:
        wholes: The uncut model in every precision that is known, the one that relative budgets refer to first.
    """

    def __init__(self, session: Session) -> None:
        self._opened = session
        self._calibrated: Session | None = None
        self._may_deepen = True
        self._predictors: dict[str, Predictor] = {}
        self.wholes = measure_wholes(session)

    def __call__(self, history: Sequence[Trial] = ()) -> Choice:
        """The best candidate that fits every limit, by prediction and by what `history` shows.

        Raises:
            NothingFits: Not even without a margin.
        """
        failure: NothingFits | None = None
        for margin in [True, False] if is_measured(self._opened.target) else [False]:
            whole = self._best_whole(self._opened, history, margin=margin)
            if whole is not None and whole.worse_by <= NEGLIGIBLE_RISE:
                return Choice(session=self._opened.in_dtype(whole.dtype), found=whole)
            try:
                return self._among_all(history, margin=margin)
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

    def _best_whole(self, session: Session, history: Sequence[Trial], *, margin: bool) -> Found | None:
        """The whole model in the best precision in which it fits: no cost table is needed."""
        for one in sorted(self._candidates, key=lambda one: one.rise):
            strategy = whole_strategy(session, one)
            problem = problem_of(session.in_dtype(one.dtype), strategy)
            predictor: Predictor = Known(one.latency)
            if not is_measured(session.target):
                predictor = make_predictor(session.in_dtype(one.dtype))
            seen = self._seen(one.dtype, history, margin=margin)
            was_tried = any(trial.choice.key == (one.dtype, session.full) for trial in history)
            if not was_tried:  # its figures, of another run, are a prediction
                seen = dataclasses.replace(seen, measured=())
            with suppress(NothingFits, NothingLoads):
                result = search_plan(problem, predictor, seen)
                return Found(dtype=one.dtype, worse_by=worse_by_rounding(strategy, one), search=result)
        return None

    def _among_all(self, history: Sequence[Trial], *, margin: bool) -> Choice:
        """The best of all subnets and of the whole model, in all precisions."""
        session = self._calibrated = self._calibrated or with_strategy(self._opened)
        candidates = self._candidates
        if quality_surface(session.strategy).metric not in ("loss", "perplexity"):
            candidates = candidates[:1]  # what rounding costs is known as a loss, and cannot be weighed
        options = []
        for one in candidates:
            problem = problem_of(session.in_dtype(one.dtype), session.strategy)
            worse_by, full_use = worse_by_rounding(session.strategy, one), self._use(one)
            options.append(
                Option(
                    dtype=one.dtype,
                    worse_by=worse_by,
                    bound=worse_by + least_badness(problem, full_use),
                    full_use=full_use,
                    search=partial(self._search, session, problem, one.dtype, history, margin=margin),
                )
            )
        found = search_precisions(options, self._best_whole(session, history, margin=margin))
        return Choice(session=session.in_dtype(found.dtype), found=found)

    def _search(
        self, session: Session, problem: Problem, dtype: str, history: Sequence[Trial], *, margin: bool
    ) -> SearchResult:
        """One precision, with its own cost table."""
        if dtype not in self._predictors:
            self._predictors[dtype] = make_predictor(session.in_dtype(dtype))
        seen = self._seen(dtype, history, margin=margin)
        result = search_plan(problem, self._predictors[dtype], seen)
        if not history:
            say_cost(session, problem, self._predictors[dtype], seen, result)
        if not history and len(self._candidates) > 1:
            best, quality = result.best, f"{result.quality_metric} {result.best.quality.value:.4g} before rounding"
            session.progress.note(f"In {dtype}: {best.shape} at {best.predicted_ms:.4g} ms, {quality}.")
        return result

    def _deepened(self, history: Sequence[Trial]) -> bool:
        """Calibrate down to smaller subnets, once, if the smallest would fit. Whether there is more to choose now."""
        if not self._may_deepen or self._calibrated is None:
            return False
        self._may_deepen = False
        session = self._calibrated
        smallest = smallest_known(session)
        if smallest is None or not any(self._would_fit(smallest, dtype, history) for dtype in self._predictors):
            return False
        session.progress.note("Nothing that the calibration knows fits: calibrating deeper and narrower.")
        self._calibrated = deeper(self._opened)
        return self._calibrated is not None

    def _would_fit(self, dense: DenseArchitecture, dtype: str, history: Sequence[Trial]) -> bool:
        reference = self._seen(dtype, history, margin=False).full
        assert reference
        return all(
            self._predictors[dtype].predict(dense, budget.metric, budget.percentile)[0]
            <= budget.resolve(reference.of(budget.metric, budget.percentile))
            for budget in self._opened.settings.budgets
        )

    def _seen(self, dtype: str, history: Sequence[Trial], *, margin: bool) -> Seen:
        latencies = {one.dtype: one.latency for one in self.wholes}
        relative = all(budget.fraction for budget in self._opened.settings.budgets)
        seen = seen_in(history, dtype, latencies, self._opened.full, relative=relative)
        if not is_measured(self._opened.target):
            seen = dataclasses.replace(seen, measured=())
        return seen if margin else dataclasses.replace(seen, margin=0.0)

    def _use(self, one: Whole) -> float:
        """The largest share of a latency budget that the whole model takes."""
        reference = self.wholes[0].latency
        return max(
            one.latency.of(budget.metric, budget.percentile)
            / budget.resolve(reference.of(budget.metric, budget.percentile))
            for budget in self._opened.settings.budgets
        )

    @property
    def _candidates(self) -> list[Whole]:
        """Those whose precision may be chosen, the preferred one first."""
        return [one for one in self.wholes if one.dtype in self._opened.settings.dtypes]
