"""Was it made for this model? Told by content where an identity is known, else by dims. Differences are in words."""

from __future__ import annotations

from amoeba_export.errors import WrongModel
from amoeba_export.ir.architecture import Architecture
from amoeba_export.ir.plan import SubnetPlan
from amoeba_export.ir.strategy import Strategy
from amoeba_export.ir.supernet import Supernet

STRATEGY_DIMS = ("num_layers", "num_heads", "num_kv_heads", "head_dim", "ffn_size")
"""Dims that a strategy has, under the names of the model's."""


def identity_difference(what: str, known: str | None, here: str | None) -> list[str]:
    """How `known`, the identity of the `what` that something was made for, differs from `here`. None fits all."""
    if known is None or here is None or known == here:
        return []
    return [f"its {what} is {known:.12}, this one is {here:.12}"]


def strategy_differences(strategy: Strategy, architecture: Architecture) -> list[str]:
    """How the dims of the model that `strategy` was made for differ from `architecture`."""
    pairs = [(name, getattr(strategy, name), getattr(architecture, name)) for name in STRATEGY_DIMS]
    pairs += [("hidden_size", width.o_bias_LD.shape[1], architecture.hidden_size) for width in strategy.widths.values()]
    differences = [f"{name} is {there} there and {here} here" for name, there, here in pairs if there != here]
    return list(dict.fromkeys(differences))


def check_plan_origin(plan: SubnetPlan, supernet: Supernet) -> None:
    """Refuse a plan of another model, or of another strategy than the one at hand. Raises `WrongModel`."""
    differences = identity_difference("model", plan.model_id, supernet.identity)
    if supernet.strategy is not None:
        differences += identity_difference("strategy", plan.strategy_id, supernet.strategy.identity)
    if differences:
        raise WrongModel("The plan", differences)
