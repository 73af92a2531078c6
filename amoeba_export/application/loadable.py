"""What the runtime of a target loads: strategies, plans and searches that keep to its `[limits]`."""

from __future__ import annotations

import dataclasses

from amoeba_export.application.session import Session
from amoeba_export.errors import NothingFits, OutsideLimits
from amoeba_export.ir import NO_LIMITS, SubnetPlan, Supernet
from amoeba_export.search import Predictor, Problem, SearchResult, Seen, search_plan


def with_limits(session: Session, supernet: Supernet) -> Supernet:
    """`supernet` whose strategy makes no biases that the runtime would drop."""
    target, strategy = session.settings.target, supernet.strategy
    if target is None or strategy is None or target.limits.takes_output_biases(supernet.architecture.family):
        return supernet
    if strategy.compensation != "none":
        session.progress.note(
            f"{target.limits.runtime} computes no biases on o_proj and down_proj of a {supernet.architecture.family}: "
            "what is removed is not compensated. The strategy's figures are of compensated cuts."
        )
    return dataclasses.replace(supernet, strategy=dataclasses.replace(strategy, compensates=False))


def check_loadable(session: Session, plan: SubnetPlan) -> SubnetPlan:
    """`plan`. Raises `OutsideLimits` when the target's runtime does not load it."""
    settings, target = session.settings, session.settings.target
    if target is not None:
        dtype = settings.dtypes[0] if settings.dtypes else None
        problems = target.limits.problems(plan.dense(session.architecture), dtype)
        if problems:
            raise OutsideLimits(target.name, target.limits.runtime, problems)
    return plan


def say_cost(session: Session, problem: Problem, predictor: Predictor, seen: Seen, found: SearchResult) -> None:
    """Tell what the best subnet without the runtime's limits would be worth, where that is more."""
    if problem.runtime == NO_LIMITS:
        return
    free = dataclasses.replace(problem, runtime=NO_LIMITS, head_multiple=1, align=session.target.align)
    try:
        best = search_plan(free, predictor, seen).best
    except NothingFits:
        return
    chosen, sign = found.best, -1 if found.higher_is_better else 1
    if sign * chosen.quality.value > sign * best.quality.value:
        session.progress.note(
            f"The limits of {problem.runtime.runtime} cost: {found.quality_metric} {chosen.quality.value:.4g} at "
            f"{chosen.shape} instead of {best.quality.value:.4g} at {best.shape}."
        )
