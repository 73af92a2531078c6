"""What must hold between a supernet, its adapters and a plan before any weight is read."""

from __future__ import annotations

from collections.abc import Sequence

from amoeba_export.errors import UnsupportedError, WrongModel
from amoeba_export.ir import Adapter, SubnetPlan, Supernet, validate
from amoeba_export.ir.belongs import check_plan_origin, identity_difference
from amoeba_export.materialize.walk import source_axes, subnet_specs


def check_inputs(supernet: Supernet, plans: Sequence[SubnetPlan]) -> None:
    """Check that every plan and adapter fits the model. The weights were checked when the model was opened.

    Raises:
        InputError: A plan is not valid.
        WrongModel: A plan, an adapter or a refit belongs to another model, or a plan to another strategy.
        UnsupportedError: An adapter changes a tied lm_head.
    """
    for plan in plans:
        validate(plan, supernet.architecture)
        check_plan_origin(plan, supernet)
        _check_refit(plan, supernet)
    linears = {name.removesuffix(".weight") for name, axes in source_axes(supernet).items() if len(axes) == 2}
    for adapter in supernet.adapters:
        _check_adapter(adapter, linears, supernet)


def _check_refit(plan: SubnetPlan, supernet: Supernet) -> None:
    refit = supernet.refit_of(plan)
    if refit is None:
        return
    differences = identity_difference("model", refit.model_id, supernet.identity)
    if refit.geometry != plan.geometry:
        differences.append("it was made for a cut that keeps other layers, heads or neurons")
    adapters = tuple(item.sha256 for item in supernet.inputs if item.role == "adapter")
    if refit.adapters != adapters:
        differences.append("it was made with other adapters")
    specs = {spec.name: spec.shape for spec in subnet_specs(supernet, plan)}
    wrong = [name for name in refit.tensors.names() if specs.get(name) != refit.tensors.shape(name)]
    differences.extend(f"{name} is {list(refit.tensors.shape(name))} there" for name in sorted(wrong)[:3])
    modules = {name.rpartition(".")[0] for name in refit.tensors.names()}
    absent = [name for name in specs if name.rpartition(".")[0] in modules and name not in refit.tensors.names()]
    differences.extend(f"it has no {name}" for name in absent[:3])
    if differences:
        raise WrongModel("The refit", differences)


def _check_adapter(adapter: Adapter, linears: set[str], supernet: Supernet) -> None:
    unknown = sorted(set(adapter.modules()) - linears)
    head = supernet.family.module("head")
    if head in unknown and supernet.architecture.tied_embeddings:
        raise UnsupportedError(
            f"The adapter {adapter.input.id} changes {head}, which shares its weight with the embedding.",
            next_step=f"Untie the model's embeddings, or train an adapter without {head}.",
        )
    if unknown:
        raise WrongModel("The adapter", [f"it changes {name}, which is not here" for name in unknown[:3]])
