"""The cut as a model that can be trained: layers of a supernet, sliced, with the weights of its refit."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import cast

import torch
from torch import nn

from amoeba_export.ir import Refit, Role, SubnetPlan, TensorSpec
from amoeba_export.model.layers import LayerStack, scaled_embedding


class Student(nn.Module):
    """Every weight of a cut model as a parameter, in fp32.

    Args:
        stack: What it is cut from, with its adapters merged.
        plan: What stays.
        biases: Per kept layer, what its writers add now [D], by writer.
        refit: Weights that take the place of the sliced ones, or None.
    """

    def __init__(
        self, stack: LayerStack, plan: SubnetPlan, biases: Sequence[dict[Role, torch.Tensor]], refit: Refit | None
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

    def forward(self, tokens_BT: torch.Tensor) -> torch.Tensor:
        """Final hidden states, normed. [B, T, D]."""
        rows_BTD = nn.functional.embedding(tokens_BT.to(self._stack.device), self.embedding_VD)
        hidden_BTD = scaled_embedding(rows_BTD, self._stack.architecture)
        for layer in self.layers:
            hidden_BTD = self._stack.run(layer, hidden_BTD)
        normed_BTD: torch.Tensor = self.norm(hidden_BTD)
        return normed_BTD

    def project(self, hidden_BTD: torch.Tensor) -> torch.Tensor:
        """Logits of final hidden states. [B, T, V]."""
        head_VD = self.embedding_VD if self.head_VD is None else self.head_VD
        return self._stack.logits(hidden_BTD @ head_VD.T)

    def weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Every parameter by its name in the cut model. What a block that is gone leaves empty is none."""
        family = self._stack.family
        yield family.weight("embedding"), self.embedding_VD
        yield from ((family.weight("final_norm"), weight) for weight in self.norm.parameters())
        if self.head_VD is not None:
            yield family.weight("head"), self.head_VD
        for position, layer in enumerate(self.layers):
            for name, parameter in layer.named_parameters():
                role, _, part = name.rpartition(".")
                if parameter.numel():
                    yield f"{family.module(cast(Role, role), position)}.{part}", parameter

    def held(self, specs: Sequence[TensorSpec]) -> Iterator[tuple[str, torch.Tensor]]:
        """The weights of `specs`, in their order."""
        weights = dict(self.weights())
        for spec in specs:
            yield spec.name, weights[spec.name].detach()
