"""What must hold between a supernet, its adapters and a plan before any weight is read."""

from __future__ import annotations

from collections.abc import Sequence

from amoeba_export.errors import UnsupportedError, WrongModel
from amoeba_export.ir import Adapter, Architecture, SubnetPlan, Supernet, validate
from amoeba_export.materialize.walk import source_axes


def check_inputs(supernet: Supernet, plans: Sequence[SubnetPlan]) -> None:
    """Check that every plan and adapter fits the model. The weights were checked when the model was opened.

    Raises:
        InputError: A plan is not valid.
        WrongModel: A plan or an adapter belongs to another model, or a plan to another strategy.
        UnsupportedError: An adapter changes a tied lm_head.
    """
    for plan in plans:
        validate(plan, supernet.architecture)
        _check_plan(plan, supernet)
    linears = {name.removesuffix(".weight") for name, axes in source_axes(supernet).items() if len(axes) == 2}
    for adapter in supernet.adapters:
        _check_adapter(adapter, linears, supernet.architecture)


def _check_plan(plan: SubnetPlan, supernet: Supernet) -> None:
    differences = []
    if plan.model_id not in (None, supernet.identity):
        differences.append(f"it was derived for model {str(plan.model_id)[:12]}, this is {supernet.identity[:12]}")
    strategy_id = supernet.strategy.identity if supernet.strategy else None
    if strategy_id and plan.strategy_id not in (None, strategy_id):
        differences.append(f"it was derived from strategy {str(plan.strategy_id)[:12]}, this is {strategy_id[:12]}")
    if differences:
        raise WrongModel("The plan", differences)


def _check_adapter(adapter: Adapter, linears: set[str], architecture: Architecture) -> None:
    unknown = sorted(set(adapter.modules()) - linears)
    if "lm_head" in unknown and architecture.tied_embeddings:
        raise UnsupportedError(
            f"The adapter {adapter.input.id} changes lm_head, which shares its weight with the embedding.",
            next_step="Untie the model's embeddings, or train an adapter without lm_head.",
        )
    if unknown:
        raise WrongModel("The adapter", [f"it changes {name}, which is not here" for name in unknown[:3]])
