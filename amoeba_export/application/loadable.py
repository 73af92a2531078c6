"""What the runtime of a target loads: strategies, plans and searches that keep to its `[limits]`."""

from __future__ import annotations

import dataclasses

from amoeba_export.application.session import Session
from amoeba_export.errors import NothingFits, OutsideLimits
from amoeba_export.formats import FORMATS
from amoeba_export.ir import NO_LIMITS, ContainerLimits, SubnetPlan, Supernet
from amoeba_export.ir.metric import better
from amoeba_export.ir.order import in_order
from amoeba_export.search import Predictor, Problem, SearchResult, Seen, search_plan
from amoeba_export.shown import an


def with_limits(session: Session, supernet: Supernet) -> Supernet:
    """`supernet` whose strategy makes cuts that the runtime loads and the containers hold, where it can see to it."""
    supernet = _within_runtime(session, supernet)
    for name in session.settings.formats:
        supernet = _within_container(session, supernet, FORMATS[name].limits(supernet.architecture))
    return supernet


def _within_container(session: Session, supernet: Supernet, limits: ContainerLimits) -> Supernet:
    """`supernet` whose strategy makes no biases that a container does not hold, and keeps the order that it wants."""
    strategy, architecture = supernet.strategy, supernet.architecture
    if strategy is None:
        return supernet
    if not limits.output_biases and strategy.compensation != "none":
        session.progress.note(
            f"{limits.container} holds no biases on what writes into the residual stream of {an(architecture.family)}: "
            "what is removed is not compensated. The strategy's figures are of compensated cuts."
        )
        strategy = dataclasses.replace(strategy, compensates=False)
    if limits.unrotated_every:
        rotated = [architecture.kind(i).rope is not None for i in range(architecture.num_layers)]
        depths = in_order(strategy.depth, rotated, limits.unrotated_every)
        others = [removed for removed, active in depths.items() if active != strategy.depth[removed]]
        if others:
            changed = sum(a != b for one in others for a, b in zip(depths[one], strategy.depth[one], strict=True)) // 2
            session.progress.note(
                f"{limits.container} takes layers without RoPE at every {limits.unrotated_every}th place alone: "
                f"{len(others)} of {len(strategy.depth)} depths keep other layers than were best, {changed} in all. "
                "The strategy's figures are of the best ones."
            )
        strategy = dataclasses.replace(strategy, depth=depths)
    return dataclasses.replace(supernet, strategy=strategy)


def _within_runtime(session: Session, supernet: Supernet) -> Supernet:
    """`supernet` whose strategy makes no biases that the runtime would drop."""
    target, strategy = session.settings.target, supernet.strategy
    if target is None or strategy is None or target.limits.takes_output_biases(supernet.architecture.family):
        return supernet
    if strategy.compensation != "none":
        session.progress.note(
            f"{target.limits.runtime} computes no biases on o_proj and down_proj of "
            f"{an(supernet.architecture.family)}: what is removed is not compensated. The strategy's figures are "
            "of compensated cuts."
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
    rules = dataclasses.replace(problem.rules, head_multiple=1, align=session.target.align)
    free = dataclasses.replace(problem, runtime=NO_LIMITS, rules=rules)
    try:
        best = search_plan(free, predictor, seen).best
    except NothingFits:
        return
    chosen = found.best
    if better(best.quality.value, chosen.quality.value, found.mode):
        session.progress.note(
            f"The limits of {problem.runtime.runtime} cost: {found.quality_metric} {chosen.quality.value:.4g} at "
            f"{chosen.shape} instead of {best.quality.value:.4g} at {best.shape}."
        )
