"""The cut as a model that can be trained: layers of a supernet, sliced, with the weights of its refit."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import nn

from amoeba_export.ir import Refit, SubnetPlan, TensorSpec
from amoeba_export.model.layers import WRITERS, LayerStack

HEAD, EMBEDDING, NORM = "lm_head.weight", "model.embed_tokens.weight", "model.norm.weight"


class Student(nn.Module):
    """Every weight of a cut model as a parameter, in fp32.

    Args:
        stack: What it is cut from, with its adapters merged.
        plan: What stays.
        biases: Per kept layer, what its writers add now [D], by writer.
        refit: Weights that take the place of the sliced ones, or None.
    """

    def __init__(
        self, stack: LayerStack, plan: SubnetPlan, biases: Sequence[dict[str, torch.Tensor]], refit: Refit | None
    ) -> None:
        super().__init__()
        self._stack = stack
        self.layers = nn.ModuleList(
            stack.sliced_layer(kept, added, replace=True) for kept, added in zip(plan.layers, biases, strict=True)
        )
        self.norm = stack.final_norm()
        names = stack.tensors.names()
        self.embedding_VD = nn.Parameter(stack.weight(EMBEDDING))
        self.head_VD = nn.Parameter(stack.weight(HEAD)) if HEAD in names else None
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
        hidden_BTD = nn.functional.embedding(tokens_BT.to(self._stack.device), self.embedding_VD)
        for layer in self.layers:
            hidden_BTD = self._stack.run(layer, hidden_BTD)
        normed_BTD: torch.Tensor = self.norm(hidden_BTD)
        return normed_BTD

    def head(self) -> torch.Tensor:
        """The vocabulary head, or the embedding where they are tied. [V, D]."""
        return self.embedding_VD if self.head_VD is None else self.head_VD

    def weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Every parameter by its name in the cut model."""
        yield EMBEDDING, self.embedding_VD
        yield from ((NORM, weight) for weight in self.norm.parameters())
        if self.head_VD is not None:
            yield HEAD, self.head_VD
        for position, layer in enumerate(self.layers):
            for name, parameter in layer.named_parameters():
                own = f"{WRITERS[0]}.bias" if name == "self_attn.bias_D" else name  # of a block without heads
                yield f"model.layers.{position}.{own}", parameter

    def held(self, specs: Sequence[TensorSpec]) -> Iterator[tuple[str, torch.Tensor]]:
        """The weights of `specs`, in their order."""
        weights = dict(self.weights())
        for spec in specs:
            yield spec.name, weights[spec.name].detach()
