"""Refit: the writers of cuts are fitted to do the work of what was cut. The whole stage is `refit`."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from amoeba_export.cache.kinds import REFITTING
from amoeba_export.errors import NotANumber
from amoeba_export.ir import Architecture, Axis, LayerPlan, Role, SubnetPlan, Supernet, TensorSpec
from amoeba_export.ir.family import WRITERS
from amoeba_export.model.bias import compensation_bias
from amoeba_export.model.head import Head, Objective
from amoeba_export.model.host import Host
from amoeba_export.model.layers import LayerStack
from amoeba_export.model.merged import MergedTensors
from amoeba_export.model.slice import kept_positions
from amoeba_export.model.workplace import open_workplace
from amoeba_export.refit.data import RefitData, read_data
from amoeba_export.refit.recipe import Draw
from amoeba_export.refit.solve import solve_bytes
from amoeba_export.refit.sweep import Cut, Sweep

MEMORY_BYTES = 3 * 2**29
"""What the streams and the largest solve take together. What does not fit lies on disk."""

_AXES: dict[Role, Axis] = dict(zip(WRITERS, ("query", "ffn"), strict=True))


@dataclass(frozen=True, kw_only=True)
class Refitted:
    """The weights of one plan, fitted; they lie in a working folder until `close`.

    Attributes:
        plan: Without the name of this refit.
        facts: What a refit file says of itself: see `ir.Refit`.
        specs: Its weights, in order.
        weights: Opens the stream of them, fp32.
    """

    plan: SubnetPlan
    facts: Mapping[str, Any]
    specs: Sequence[TensorSpec]
    weights: Callable[[], Iterator[tuple[str, torch.Tensor]]]


def refit(
    supernet: Supernet,
    plans: Sequence[SubnetPlan],
    draw: Draw,
    *,
    take: Callable[[Sequence[Refitted]], None],
    host: Host,
) -> None:
    """Fit o_proj and down_proj of every kept layer of `plans`, all in one pass of the full model.

    Of a mixture of experts, o_proj alone is fitted.
    The teacher is the full model with its adapters; a cut has them merged for its own gate. Shapes do not change, and a
    bias is fitted only where the plan has one.

    Args:
        supernet: With its adapters, and its strategy where a plan compensates.
        plans: What to fit. Plans of the same geometry are fitted once each.
        draw: Tokens and strengths.
        take: Is given the result, and has to store what it wants of it before it returns.
        host: Where layers run and finished ones are kept.

    Raises:
        InputError: The texts of the recipe cannot be used.
        NotANumber: A loss is not finite.
    """
    # Long on purpose: the facts of a run are listed here.
    device, progress = host.chosen_device, host.progress
    data = read_data(draw, supernet.text_folder)
    full = LayerStack(supernet, memory_bytes=0, device=device, tensors=MergedTensors(supernet, supernet.full_plan()))
    cuts = [_cut(supernet, plan, device) for plan in plans]
    facts = {
        "refit": REFITTING.version,
        "layers": 2,  # how solved layers are written
        "samples": data.digest,
        "strengths": list(draw.recipe.strengths),
        "plans": [plan.geometry for plan in plans],
        "strategy": supernet.strategy.identity if supernet.strategy else None,
        "adapters": list(adapter_ids(supernet)),
        "device": device.type,
    }
    with open_workplace(supernet.identity, host) as workplace:
        folder = workplace.folder_of(facts)
        sweep = Sweep(
            full,
            cuts,
            data,
            folder,
            strengths=draw.recipe.strengths,
            memory_bytes=max(0, MEMORY_BYTES - _solve_bytes_of(supernet.architecture)),
            progress=progress,
        )
        num_layers = supernet.architecture.num_layers
        with progress.track(f"Refitting {' and '.join(str(plan.shape) for plan in plans)}", num_layers) as advance:
            for _ in sweep.layers():
                advance(1)
        made = []
        with progress.track("Measuring held-out losses", 1 + 2 * len(cuts)) as advance:

            def losses_of(last: Callable[[int], torch.Tensor]) -> dict[str, float]:
                losses = _losses(full, data, last)
                advance(1)
                return losses

            losses_full = losses_of(lambda batch_idx: sweep.last(None, batch_idx))
            for cut_idx, cut in enumerate(cuts):
                losses = {
                    "full": losses_full,
                    "cut": losses_of(_run_cut(cut, data)),
                    "refit": losses_of(lambda batch_idx, i=cut_idx: sweep.last(i, batch_idx)),  # type: ignore[misc]
                }
                made.append(_result(supernet, cut.plan, draw, sweep, cut_idx, losses))
        take(made)
        shutil.rmtree(folder, ignore_errors=True)


def _solve_bytes_of(architecture: Architecture) -> int:
    """What solving the wider writer takes."""
    solved_neurons = 0 if architecture.expert_size else architecture.ffn_size
    num_inputs = max(architecture.num_heads * architecture.head_dim, solved_neurons)
    return solve_bytes(num_inputs, architecture.hidden_size)


def adapter_ids(supernet: Supernet) -> tuple[str, ...]:
    """Which adapters are applied, by content."""
    return tuple(item.sha256 for item in supernet.inputs if item.role == "adapter")


def _cut(supernet: Supernet, plan: SubnetPlan, device: torch.device) -> Cut:
    stack = LayerStack(supernet, memory_bytes=0, device=device, tensors=MergedTensors(supernet, plan))
    return Cut(plan=plan, stack=stack, biases=[writer_biases(supernet, plan, kept) for kept in plan.layers])


def writer_biases(supernet: Supernet, plan: SubnetPlan, kept: LayerPlan) -> dict[Role, torch.Tensor]:
    """What the writers of a kept layer add now: their own bias and the compensation. [D] each, none without either."""
    architecture, tensors = supernet.architecture, supernet.tensors
    compensated = dict(
        zip(WRITERS, (plan.has_o_bias(kept, architecture), plan.has_down_bias(kept, architecture)), strict=True)
    )
    biases: dict[Role, torch.Tensor] = {}
    for writer, axis in _AXES.items():
        weight, bias = (name(writer, kept.source_layer) for name in (supernet.family.weight, supernet.family.bias))
        if bias in tensors.names():
            biases[writer] = tensors.read(bias).float()
        if compensated[writer]:
            columns = kept_positions(axis, kept, architecture)
            constant_D = compensation_bias(tensors.read(weight), columns, axis, kept, plan, supernet.strategy)
            biases[writer] = biases[writer] + constant_D if writer in biases else constant_D
    return biases


def _run_cut(cut: Cut, data: RefitData) -> Callable[[int], torch.Tensor]:
    """The stream of the cut as it is without the fit, over the texts that losses are reported on."""
    states = {
        batch_idx: cut.stack.embed(data.batches[batch_idx].tokens_BT)
        for _, positions in data.texts.values()
        for batch_idx in positions
    }
    with torch.no_grad():
        for kept, biases in zip(cut.plan.layers, cut.biases, strict=True):
            module = cut.stack.sliced_layer(kept, biases, replace=True)
            states = {batch_idx: cut.stack.run(module, hidden_BTD) for batch_idx, hidden_BTD in states.items()}
    return states.__getitem__


def _losses(stack: LayerStack, data: RefitData, last: Callable[[int], torch.Tensor]) -> dict[str, float]:
    """Text -> mean negative log-likelihood of a token."""
    head, losses = Head(stack), {}
    for text, (samples, positions) in data.texts.items():
        scores: list[float] = []
        with torch.no_grad():
            for batch, batch_idx in zip(samples.batches, positions, strict=True):
                scores += head.scores(batch, last(batch_idx), "loss").tolist()
        losses[text] = Objective("loss", samples).value(scores)
        if not torch.isfinite(torch.tensor(losses[text])):
            raise NotANumber(f"the loss on {text}", [])
    return losses


def _result(
    supernet: Supernet,
    plan: SubnetPlan,
    draw: Draw,
    sweep: Sweep,
    cut_idx: int,
    losses: Mapping[str, Mapping[str, float]],
) -> Refitted:
    specs, figures, family = [], {}, supernet.family
    for position, layer in enumerate(sweep.solved(cut_idx)):
        for writer in WRITERS:
            for part in ("weight", "bias"):
                tensor = layer.get(f"{writer}.{part}")
                if tensor is not None and tensor.numel():
                    name = f"{family.module(writer, position)}.{part}"
                    specs.append(TensorSpec(name=name, shape=tuple(tensor.shape)))
            if f"{writer}.figures" in layer:
                before, after, strength = layer[f"{writer}.figures"].tolist()
                figures[f"{position}.{writer}"] = {
                    "before": before,
                    "after": after,
                    "strength": None if strength < 0 else round(strength, 9),
                }

    def weights() -> Iterator[tuple[str, torch.Tensor]]:
        for position, layer in enumerate(sweep.solved(cut_idx)):
            for writer in WRITERS:
                for part in ("weight", "bias"):
                    tensor = layer.get(f"{writer}.{part}")
                    if tensor is not None and tensor.numel():
                        yield f"{family.module(writer, position)}.{part}", tensor

    texts = losses["full"]
    facts = {
        "geometry": plan.geometry,
        "model_id": supernet.identity,
        "adapters": list(adapter_ids(supernet)),
        "kind": "refit",
        "settings": {"version": REFITTING.version, **draw.settings, "writers": figures},
        "losses": {text: {name: values[text] for name, values in losses.items()} for text in texts},
    }
    return Refitted(plan=plan, facts=facts, specs=specs, weights=weights)
