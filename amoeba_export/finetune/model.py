"""The supernet with one subnet switched on: dropped layers are not run, dropped heads and neurons are not there.

B batch, T tokens, D hidden, H head dim, V vocabulary, P selected positions. Legend of the layers: `layer.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from amoeba_export.finetune.layer import LayerCut, SlicedLayer, rms_norm
from amoeba_export.finetune.smol import LowRank, unchanged
from amoeba_export.ir import LayerPlan, SubnetPlan, Supernet
from amoeba_export.model.function import Place, capped_logits, temperature_at
from amoeba_export.model.layers import scaled_embedding
from amoeba_export.model.rotary import Rotary


@dataclass(frozen=True, slots=True, eq=False)
class PreparedPlan:
    """A plan made ready to run: indices and compensation biases, computed once."""

    plan: SubnetPlan
    layers: tuple[LayerCut, ...]


class SlicedSupernet(nn.Module):
    """A supernet in memory that runs any of its subnets, with low-rank changes of its linear weights.

    Args:
        supernet: Its weights are read once; its adapters are not applied here.
        dtype: Of the frozen weights and the activations. Norms and losses are computed in fp32.
        checkpoint_layers: Recompute each layer in the backward pass instead of keeping its activations.
    """

    def __init__(
        self,
        supernet: Supernet,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        checkpoint_layers: bool = False,
    ) -> None:
        super().__init__()
        architecture = supernet.architecture
        self.architecture = architecture
        self.strategy = supernet.strategy
        self.checkpoint_layers = checkpoint_layers
        self._cuts: dict[tuple[LayerPlan, bool, float | None], LayerCut] = {}

        def frozen(name: str, order: torch.Tensor | None = None, *, transposed: bool = False) -> nn.Parameter:
            weight = supernet.tensors.read(name)
            weight = weight.t() if transposed else weight
            weight = weight.contiguous() if order is None else weight[order]
            return nn.Parameter(weight.to(device=device, dtype=dtype), requires_grad=False)

        family = supernet.family
        self._embedding, self._head = family.module("embedding"), family.module("head")
        self.embed_VD = frozen(family.weight("embedding"))
        self.head_VD = self.embed_VD if architecture.tied_embeddings else frozen(family.weight("head"))
        self.norm_D = frozen(family.weight("final_norm"))
        self.layers = nn.ModuleList(
            SlicedLayer(family, architecture, i, frozen, supernet.strategy) for i in range(architecture.num_layers)
        )
        self._rotaries = [
            None if kind.rope is None else Rotary(kind.rope, architecture, torch.device(device))
            for kind in architecture.layer_kinds
        ]

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.embed_VD.device

    def cut(self, plan: SubnetPlan) -> PreparedPlan:
        """Make `plan` ready to run.

        Raises:
            InputError: The plan compensates removed channels and the strategy has no means for it.
        """
        return PreparedPlan(plan, tuple(self._layer_cut(layer, plan) for layer in plan.layers))

    def _layer_cut(self, layer: LayerPlan, plan: SubnetPlan) -> LayerCut:
        """Kept for the next plan that cuts this layer alike, as all depths of one width do."""
        key = (layer, plan.compensate, plan.width_key)
        if key not in self._cuts:
            self._cuts[key] = self._layer(layer.source_layer).cut(layer, plan, self.strategy)
        return self._cuts[key]

    def _layer(self, index: int) -> SlicedLayer:
        return cast(SlicedLayer, self.layers[index])

    def forward(
        self,
        input_ids_BT: torch.Tensor,
        *,
        cut: PreparedPlan,
        low_rank: LowRank = unchanged,
        select_BT: torch.Tensor | None = None,
        segments_BT: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """What `logits` is given: normed states [P, D] of the selected positions, row by row.

        Args:
            input_ids_BT: Tokens.
            cut: The subnet.
            low_rank: What changes the weights of this subnet.
            select_BT: Positions that are wanted; None for all.
            segments_BT: Which example of its row a token belongs to, counted from 1; 0 is padding. Examples do not see
                each other, and each starts at position 0. None: a row is one example, padded (if at all) at its end.
        """
        x_BTD = functional.embedding(input_ids_BT, self.embed_VD)
        if pair := low_rank(self._embedding):
            a_RD, b_VR = (part.to(x_BTD.dtype) for part in pair)
            x_BTD = x_BTD + functional.embedding(input_ids_BT, b_VR) @ a_RD
        x_BTD = scaled_embedding(x_BTD, self.architecture)
        places = self._places(x_BTD, segments_BT, input_ids_BT)
        for layer in cut.layers:
            source_layer = layer.plan.source_layer
            run, place = self._layer(source_layer), places[self.architecture.kind_index(source_layer)]
            if self.checkpoint_layers and torch.is_grad_enabled():
                x_BTD = checkpoint(run, x_BTD, place, layer, low_rank, use_reentrant=False)
            else:
                x_BTD = run(x_BTD, place, layer, low_rank)
        x_PD = x_BTD.flatten(0, 1) if select_BT is None else x_BTD[select_BT]
        return rms_norm(x_PD, self.norm_D, self.architecture.norm_eps, self.architecture.norm_offset)

    def _places(self, x_BTD: torch.Tensor, segments_BT: torch.Tensor | None, input_ids_BT: torch.Tensor) -> list[Place]:
        """Where the tokens stand, for each kind of layer."""
        positions_BT = _positions(segments_BT, input_ids_BT)
        temperature_BT = temperature_at(self.architecture.query_temperature, positions_BT)
        places = []
        for kind, rotary in zip(self.architecture.layer_kinds, self._rotaries, strict=True):
            cos, sin = (None, None) if rotary is None else rotary(x_BTD, positions_BT)
            mask = _mask(segments_BT, input_ids_BT, kind.window)
            places.append(Place(cos=cos, sin=sin, mask=mask, temperature_BT=temperature_BT))
        return places

    def logits(self, x_PD: torch.Tensor, *, low_rank: LowRank = unchanged) -> torch.Tensor:
        """Fp32 logits [P, V] of what `forward` returned."""
        logits_PV = functional.linear(x_PD, self.head_VD)
        if pair := low_rank(self._head):
            a_RD, b_VR = (part.to(x_PD.dtype) for part in pair)
            logits_PV = logits_PV + functional.linear(functional.linear(x_PD, a_RD), b_VR)
        return capped_logits(logits_PV.float(), self.architecture)


@dataclass(frozen=True, slots=True, eq=False)
class RunningSubnet:
    """One subnet of a supernet in memory, for evaluation: nothing is trained and no noise is drawn."""

    model: SlicedSupernet
    cut: PreparedPlan
    low_rank: LowRank = unchanged

    @torch.no_grad()
    def logits(self, input_ids_BT: torch.Tensor, select_BT: torch.Tensor) -> torch.Tensor:
        """Fp32 logits [P, V] at the selected positions, row by row. Rows are padded at their end."""
        device = self.model.device
        x_PD = self.model(input_ids_BT.to(device), cut=self.cut, low_rank=self.low_rank, select_BT=select_BT.to(device))
        return self.model.logits(x_PD, low_rank=self.low_rank)


def _positions(segments_BT: torch.Tensor | None, input_ids_BT: torch.Tensor) -> torch.Tensor:
    """Position of each token within its example."""
    columns_T = torch.arange(input_ids_BT.shape[1], device=input_ids_BT.device)
    if segments_BT is None:
        return columns_T[None]
    starts_BT = torch.zeros_like(segments_BT, dtype=torch.int64)
    starts_BT[:, 1:] = (segments_BT[:, 1:] != segments_BT[:, :-1]) * columns_T[1:]
    return columns_T - starts_BT.cummax(dim=1).values


def _mask(
    segments_BT: torch.Tensor | None, input_ids_BT: torch.Tensor, sliding_window: int | None
) -> torch.Tensor | None:
    """Who sees whom, bool [B, 1, T, T] (or [1, 1, T, T]); None when plain causal attention says it all.

    Padding is last, so no token sees it; it sees itself, because a row without anything to see is not a number.
    """
    num_tokens = input_ids_BT.shape[1]
    window = sliding_window if sliding_window is not None and sliding_window < num_tokens else None
    if window is None and (segments_BT is None or int(segments_BT.max()) == 1):
        return None
    columns_T = torch.arange(num_tokens, device=input_ids_BT.device)
    distance_TT = columns_T[:, None] - columns_T
    mask = (distance_TT >= 0)[None]
    if window is not None:
        mask = mask & (distance_TT < window)
    if segments_BT is not None:
        mask = mask & (segments_BT[:, :, None] == segments_BT[:, None, :])
    return mask[:, None]
