"""The cut as a model that can be trained: layers of a supernet, sliced, with the weights of its refit."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import cast

import torch
from torch import nn
from torch.nn.utils import parametrize

from amoeba_export.ir import Refit, Role, SubnetPlan, TensorSpec
from amoeba_export.model.layer import Linear
from amoeba_export.model.layers import LayerStack, scaled_embedding

LOW_RANK_ALPHA = 32.0
"""A change is scaled by this over its rank."""


class LowRank(nn.Module):
    """A change of a weight as the product of two thin matrices (LoRA, arXiv 2106.09685), zero at first.

    Args:
        weight_OI: What is changed.
        rank: Of the change.
        generator: Draws the matrix that is not zero.
    """

    def __init__(self, weight_OI: torch.Tensor, rank: int, generator: torch.Generator) -> None:
        super().__init__()
        num_outputs, num_inputs = weight_OI.shape
        down_RI = torch.randn(rank, num_inputs, generator=generator) / num_inputs**0.5
        self.down_RI = nn.Parameter(down_RI.to(weight_OI.device))
        self.up_OR = nn.Parameter(weight_OI.new_zeros(num_outputs, rank))
        self.scale = LOW_RANK_ALPHA / rank

    def forward(self, weight_OI: torch.Tensor) -> torch.Tensor:
        """The changed weight."""
        return torch.addmm(weight_OI, self.up_OR, self.down_RI, alpha=self.scale)


class Student(nn.Module):
    """Every weight of a cut model in fp32: as a parameter, or with a change of low rank as the parameter.

    With changes of low rank, norms and biases are trained as they are; the embedding and the head stay.

    Args:
        stack: What it is cut from, with its adapters merged.
        plan: What stays.
        biases: Per kept layer, what its writers add now [D], by writer.
        refit: Weights that take the place of the sliced ones, or None.
        rank: Of the changes; None trains the weights themselves.
        seed: Of the draw of the changes.
    """

    def __init__(
        self,
        stack: LayerStack,
        plan: SubnetPlan,
        biases: Sequence[dict[Role, torch.Tensor]],
        refit: Refit | None,
        *,
        rank: int | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self._stack = stack
        self.layers = nn.ModuleList(
            stack.sliced_layer(kept, added, replace=True) for kept, added in zip(plan.layers, biases, strict=True)
        )
        self.norm = stack.final_norm()
        family = stack.family
        has_head = family.weight("head") in stack.tensors.names()
        self.embedding_VD = nn.Parameter(stack.weight(family.weight("embedding")))
        self.head_VD = nn.Parameter(stack.weight(family.weight("head"))) if has_head else None
        for parameter in self.parameters():
            parameter.requires_grad_(True)
        if refit is not None:
            held = set(refit.tensors.names())
            with torch.no_grad():
                for name, weight in self.weights():
                    if name in held:
                        weight.copy_(refit.tensors.read(name))
        if rank is not None:
            self._train_changes(rank, torch.Generator().manual_seed(seed))

    def _train_changes(self, rank: int, generator: torch.Generator) -> None:
        """Give the matrices of the layers changes of low rank, and train those instead of what is large."""
        for weight in (self.embedding_VD, self.head_VD):
            if weight is not None:
                weight.requires_grad_(False)
        matrices = [module for module in self.layers.modules() if isinstance(module, Linear) and module.weight.numel()]
        for module in matrices:
            module.weight.requires_grad_(False)
            parametrize.register_parametrization(module, "weight", LowRank(module.weight, rank, generator))

    def trained(self) -> dict[str, nn.Parameter]:
        """The parameters that are trained, by their names in this module."""
        return {name: parameter for name, parameter in self.named_parameters() if parameter.requires_grad}

    def forward(self, tokens_BT: torch.Tensor) -> torch.Tensor:
        """Final hidden states, normed. [B, T, D]."""
        rows_BTD = nn.functional.embedding(tokens_BT.to(self._stack.device), self.embedding_VD)
        hidden_BTD = scaled_embedding(rows_BTD, self._stack.architecture)
        with parametrize.cached():  # a changed weight is made once
            for layer in self.layers:
                hidden_BTD = self._stack.run(layer, hidden_BTD)
        normed_BTD: torch.Tensor = self.norm(hidden_BTD)
        return normed_BTD

    def project(self, hidden_BTD: torch.Tensor) -> torch.Tensor:
        """Logits of final hidden states. [B, T, V]."""
        head_VD = self.embedding_VD if self.head_VD is None else self.head_VD
        return self._stack.logits(hidden_BTD @ head_VD.T)

    def weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Every weight by its name in the cut model. What a block that is gone leaves empty is none."""
        family = self._stack.family
        yield family.weight("embedding"), self.embedding_VD
        yield from ((family.weight("final_norm"), weight) for weight in self.norm.parameters())
        if self.head_VD is not None:
            yield family.weight("head"), self.head_VD
        for position, layer in enumerate(self.layers):
            for role, module in layer.named_children():
                for part in ("weight", "bias"):
                    weight = getattr(module, part, None)
                    if weight is not None and weight.numel():
                        yield f"{family.module(cast(Role, role), position)}.{part}", weight

    def held(self, specs: Sequence[TensorSpec]) -> Iterator[tuple[str, torch.Tensor]]:
        """The weights of `specs`, in their order."""
        weights = dict(self.weights())
        for spec in specs:
            yield spec.name, weights[spec.name].detach()
