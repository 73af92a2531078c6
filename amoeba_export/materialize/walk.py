"""What is made from what: the family's table of weights, walked once for any number of plans.

Weights are grouped by module (the name up to the last dot), because the compensation bias of a module comes from the
same columns that its weight leaves out.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from amoeba_export.ir import Architecture, Axis, LayerPlan, Role, SubnetPlan, Supernet, TensorSpec, TensorTemplate
from amoeba_export.ir.dtype import written_as
from amoeba_export.ir.family import block_of
from amoeba_export.model.slice import kept_positions


@dataclass(frozen=True, slots=True)
class Use:
    """One plan's use of a source module, which is called `name` in that plan's subnet. No layer: outside the layers."""

    plan_idx: int
    name: str
    layer: LayerPlan | None


@dataclass(frozen=True, slots=True)
class Module:
    """The weights that share a source name up to the last dot, by their last part, and who wants them."""

    name: str
    axes: Mapping[str, tuple[Axis, ...]]
    uses: tuple[Use, ...]


def modules(supernet: Supernet, plans: Sequence[SubnetPlan]) -> Iterator[Module]:
    """Every source module that some plan uses, in the family's order, layers ascending."""
    family, architecture = supernet.family, supernet.architecture
    for (stem, _), axes in _by_module(family.globals, architecture).items():
        yield Module(stem, axes, tuple(Use(plan_idx, stem, None) for plan_idx in range(len(plans))))
    table = _by_module(family.layer, architecture)
    by_source = [{layer.source_layer: (i, layer) for i, layer in enumerate(plan.layers)} for plan in plans]
    for source_layer in range(architecture.num_layers):
        for (stem, role), axes in table.items():
            uses = []
            for plan_idx, plan in enumerate(plans):
                if source_layer in by_source[plan_idx]:
                    position, layer = by_source[plan_idx][source_layer]
                    if _survives(role, layer, plan, architecture):
                        uses.append(Use(plan_idx, stem.format(layer=position), layer))
            if uses:
                yield Module(stem.format(layer=source_layer), axes, tuple(uses))


def compensated_axis(
    axes: Mapping[str, tuple[Axis, ...]], layer: LayerPlan | None, plan: SubnetPlan, architecture: Architecture
) -> Axis | None:
    """`query` or `ffn` when the inputs of this module are heads or neurons and get a compensation bias, else None."""
    inputs = axes.get("weight", ())[1:]
    if layer is None or not inputs:
        return None
    has_bias = {
        "query": plan.has_o_bias(layer, architecture),
        "ffn": plan.has_down_bias(layer, architecture),
    }
    return inputs[0] if has_bias.get(inputs[0]) else None


def subnet_specs(supernet: Supernet, plan: SubnetPlan, *, dtype: torch.dtype | None = None) -> Iterator[TensorSpec]:
    """A subnet's weights in stream order, without reading any; in `dtype`, or each in its source's own."""
    architecture = supernet.architecture
    for module in modules(supernet, [plan]):
        (use,) = module.uses
        shapes = {part: _cut_shape(axes, use.layer, architecture) for part, axes in module.axes.items()}
        if compensated_axis(module.axes, use.layer, plan, architecture):
            shapes["bias"] = shapes["weight"][:1]
        for part in ("weight", "bias"):
            if part in shapes and 0 not in shapes[part]:
                # A bias that only the cut has comes from the weight beside it.
                origin = f"{module.name}.{part if part in module.axes else 'weight'}"
                kind = dtype or written_as(supernet.tensors.dtype(origin))
                yield TensorSpec(name=f"{use.name}.{part}", shape=shapes[part], dtype=kind)


def source_axes(supernet: Supernet) -> dict[str, tuple[Axis, ...]]:
    """Every weight that the family says this model has, by its full name."""
    architecture = supernet.architecture
    everything = modules(supernet, [SubnetPlan.full(architecture)])
    return {f"{module.name}.{part}": axes for module in everything for part, axes in module.axes.items()}


def _cut_shape(axes: Sequence[Axis], layer: LayerPlan | None, architecture: Architecture) -> tuple[int, ...]:
    kept = [kept_positions(axis, layer, architecture) for axis in axes]
    return tuple(architecture.axis_size(a) if k is None else len(k) for a, k in zip(axes, kept, strict=True))


def _by_module(
    templates: Sequence[TensorTemplate], architecture: Architecture
) -> dict[tuple[str, Role], dict[str, tuple[Axis, ...]]]:
    """The templates that this model has, grouped by module and its role, in table order."""
    grouped: dict[tuple[str, Role], dict[str, tuple[Axis, ...]]] = {}
    for template in templates:
        if architecture.has(template):
            stem, _, part = template.name.rpartition(".")
            grouped.setdefault((stem, template.role), {})[part] = template.axes
    return grouped


def _survives(role: Role, layer: LayerPlan, plan: SubnetPlan, architecture: Architecture) -> bool:
    """Whether anything of a layer's module is left: a block that is gone keeps at most what its output bias makes."""
    if block_of(role) == "attention":
        kept, left = layer.query_heads, ("o", "attn_out_norm")
        has_bias = architecture.o_bias or plan.has_o_bias(layer, architecture)
    else:
        kept, left = layer.ffn, ("down", "ffn_out_norm")
        has_bias = architecture.mlp_bias or plan.has_down_bias(layer, architecture)
    return bool(kept) or (has_bias and role in left)
