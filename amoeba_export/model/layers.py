"""Run single layers of a supernet, whole or cut, without ever building the model. All arithmetic is fp32."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import cast

import torch
from torch import nn

from amoeba_export.ir import Architecture, Importance, LayerPlan, Part, Role, Supernet, TensorSource
from amoeba_export.ir.dense import Compensation, has_compensation
from amoeba_export.ir.family import WRITERS
from amoeba_export.model.function import Place, capped_logits, temperature_at
from amoeba_export.model.layer import DecoderLayer, Norm
from amoeba_export.model.rotary import Rotary
from amoeba_export.model.slice import kept_positions

CPU = torch.device("cpu")
NO_BIASES: Mapping[Role, torch.Tensor] = MappingProxyType({})


@dataclass(slots=True)
class Work:
    """Forwards done, for progress and for proofs. Does not count cut layers by their size.

    Attributes:
        layer_tokens: Tokens times layers that they went through, padding included.
        head_logits: Tokens times vocabulary rows that they were multiplied with.
    """

    layer_tokens: int = 0
    head_logits: int = 0


class LayerStack:
    """The layers, embedding and final norm of a supernet. Adapters of the supernet are not applied.

    Args:
        supernet: Its weights are read when they are needed.
        tensors: Where they are read instead, such as with adapters merged.
        device: Where layers run.
        memory_bytes: All layers stay in memory when they take at most half of it in fp32; else each one is read
            whenever it is asked for.

    Attributes:
        layer_bytes: Weights of one layer in fp32.
        is_resident: Whether all layers stay in memory.
        head_layers: Layers that cost as much as the vocabulary head.
    """

    def __init__(
        self,
        supernet: Supernet,
        *,
        memory_bytes: int,
        tensors: TensorSource | None = None,
        device: torch.device = CPU,
    ) -> None:
        self.architecture = supernet.architecture
        self.family = supernet.family
        self.tensors = tensors or supernet.tensors
        self.device = device
        self.work = Work()
        self.memory_bytes = memory_bytes
        self._templates = [t for t in self.family.layer if self.architecture.has(t)]
        self._rotaries: list[Rotary | None] = [
            None if kind.rope is None else Rotary(kind.rope, self.architecture, device)
            for kind in self.architecture.layer_kinds
        ]
        self._norm = Norm(self.weight(self.family.weight("final_norm")), self.architecture)
        uncut = self.architecture.uncut
        num_weights = uncut.layer_params(uncut.layers[0])
        self.layer_bytes = 4 * num_weights
        self.is_resident = self.layer_bytes * self.architecture.num_layers <= memory_bytes // 2
        self.head_layers = self.architecture.vocab_size * self.architecture.hidden_size // num_weights
        self._resident: dict[int, DecoderLayer] = {}
        self._places: dict[tuple[int, int], Place] = {}

    def weight(self, name: str) -> torch.Tensor:
        """A copy of any weight, fp32."""
        return self.tensors.read(name).to(self.device, torch.float32, copy=True)

    def head_name(self) -> str:
        """The weight of the vocabulary head: the embedding's where they are tied."""
        return self.family.weight(self.architecture.logits_role)

    def embed(self, tokens_BT: torch.Tensor) -> torch.Tensor:
        """Input of layer 0. [B, T, D]. Only the rows that are looked up are read."""
        rows_BTD = self.tensors.read(self.family.weight("embedding"))[tokens_BT].to(self.device, torch.float32)
        return scaled_embedding(rows_BTD, self.architecture)

    def final_norm(self) -> nn.Module:
        """A copy of the norm after the last layer."""
        norm: nn.Module = copy.deepcopy(self._norm)
        return norm

    def norm(self, hidden_TD: torch.Tensor) -> torch.Tensor:
        """The final norm. [T, D]."""
        normed: torch.Tensor = self._norm(hidden_TD)
        return normed

    def logits(self, products: torch.Tensor) -> torch.Tensor:
        """Logits, from products of normed states with rows of the head: divided and capped as the family does."""
        return capped_logits(products, self.architecture)

    def layer(self, layer_idx: int) -> DecoderLayer:
        """Layer `layer_idx` as it is."""
        if layer_idx in self._resident:
            return self._resident[layer_idx]
        weights: dict[tuple[Role, Part], torch.Tensor] = {}
        for template in self._templates:
            name = template.name.format(layer=layer_idx)
            weights[template.role, self.family.place(name).part] = self.weight(name)
        module = DecoderLayer(self.architecture, self.architecture.kind_index(layer_idx), weights)
        if self.is_resident:
            self._resident[layer_idx] = module
        return module

    def cut_layer(self, plan: LayerPlan, importance: Importance, *, compensation: Compensation) -> DecoderLayer:
        """The layer of `plan`, sliced, with the mean of what it lost as biases: what a materialized subnet computes."""
        biases: dict[Role, torch.Tensor] = {}
        arch, num_heads = self.architecture, len(plan.query_heads)
        has_o_bias = has_compensation(compensation, kept=num_heads, whole=arch.num_heads)
        has_down_bias = arch.has_down_bias(compensation, kept=len(plan.ffn))
        for role, is_wanted, mean_LI, kept_I in (
            (WRITERS[0], has_o_bias, importance.o_mean_LQ, _channels(plan.query_heads, arch.head_dim)),
            (WRITERS[1], has_down_bias, importance.down_mean_LF, torch.tensor(plan.ffn, dtype=torch.int64)),
        ):
            if is_wanted:
                w_OI = self._source(plan.source_layer, role, "weight")
                removed_mean_I = torch.tensor(mean_LI[plan.source_layer], dtype=torch.float64)
                removed_mean_I[kept_I] = 0.0
                biases[role] = (w_OI.double() @ removed_mean_I).float()
        return self.sliced_layer(plan, biases)

    def sliced_layer(
        self, plan: LayerPlan, biases: Mapping[Role, torch.Tensor] = NO_BIASES, *, replace: bool = False
    ) -> DecoderLayer:
        """The layer of `plan` with the kept rows and columns of its weights.

        A block without heads, or without neurons, adds what its writer's bias makes, or nothing.

        Args:
            plan: What it keeps.
            biases: By writer [D]: added to its bias, or instead of it (`replace`).
            replace: See there.
        """
        weights: dict[tuple[Role, Part], torch.Tensor] = {}
        for template in self._templates:
            part = self.family.place(template.name.format(layer=0)).part
            weight = self._source(plan.source_layer, template.role, part)
            for dim, axis in enumerate(template.axes):
                if (kept := kept_positions(axis, plan, self.architecture)) is not None:
                    weight = weight.index_select(dim, kept.to(weight.device))
            weights[template.role, part] = weight
        for role, bias_D in biases.items():
            own_D = None if replace else weights.get((role, "bias"))
            weights[role, "bias"] = bias_D.to(self.device) if own_D is None else own_D + bias_D
        return DecoderLayer(self.architecture, self.architecture.kind_index(plan.source_layer), weights)

    def writer_input(self, module: DecoderLayer, writer: Role, hidden_BTD: torch.Tensor) -> torch.Tensor:
        """What enters a writer of one layer when `hidden_BTD` enters its block. [B, T, C]."""
        return module.enter(writer, hidden_BTD, self._place(module, hidden_BTD))

    def block(self, module: DecoderLayer, writer: Role, hidden_BTD: torch.Tensor) -> torch.Tensor:
        """The residual stream after the block of `writer`. [B, T, D]."""
        return module.block(writer, hidden_BTD, self._place(module, hidden_BTD))

    def run(self, module: nn.Module, hidden_BTD: torch.Tensor) -> torch.Tensor:
        """The output of one layer. [B, T, D]."""
        self.work.layer_tokens += hidden_BTD.shape[0] * hidden_BTD.shape[1]
        layer = cast(DecoderLayer, module)
        output: torch.Tensor = layer(hidden_BTD, self._place(layer, hidden_BTD))
        return output

    def _source(self, layer_idx: int, role: Role, part: Part) -> torch.Tensor:
        """One weight of a layer in fp32: the resident one, or read now."""
        if layer_idx in self._resident or self.is_resident:
            return self.layer(layer_idx).get_parameter(f"{role}.{part}").detach()
        name = self.family.weight(role, layer_idx) if part == "weight" else self.family.bias(role, layer_idx)
        return self.weight(name)

    def _place(self, module: DecoderLayer, hidden_BTD: torch.Tensor) -> Place:
        """Angles and mask for samples of this length."""
        num_tokens = hidden_BTD.shape[1]
        if (module.kind, num_tokens) not in self._places:
            positions_BT = torch.arange(num_tokens, device=self.device)[None]
            rotary = self._rotaries[module.kind]
            cos, sin = (None, None) if rotary is None else rotary(hidden_BTD, positions_BT)
            self._places[module.kind, num_tokens] = Place(
                cos=cos,
                sin=sin,
                mask=self._mask(self.architecture.layer_kinds[module.kind].window, num_tokens),
                temperature_BT=temperature_at(self.architecture.query_temperature, positions_BT),
            )
        return self._places[module.kind, num_tokens]

    def _mask(self, window: int | None, num_tokens: int) -> torch.Tensor | None:
        """None is causal. A sliding window only needs a mask where samples are longer than it."""
        if window is None or num_tokens <= window:
            return None
        return (
            torch.ones(num_tokens, num_tokens, dtype=torch.bool, device=self.device).tril().triu(1 - window)[None, None]
        )


def scaled_embedding(rows: torch.Tensor, architecture: Architecture) -> torch.Tensor:
    """Rows of the embedding as layer 0 gets them."""
    return rows if architecture.embedding_scale == 1.0 else rows * architecture.embedding_scale


def _channels(heads: tuple[int, ...], head_dim: int) -> torch.Tensor:
    """Channels of the heads, in order."""
    return (torch.tensor(heads, dtype=torch.int64)[:, None] * head_dim + torch.arange(head_dim)).reshape(-1)
