"""One layer of the supernet that runs with any of its heads and neurons: sliced, not multiplied by zero.

B batch, T tokens, D hidden, F FFN, N query heads, K KV heads, H head dim, Q = N * H, R rank, O out, I in features.

The base weights are frozen, and held with the best heads and neurons first: what a shape keeps is then a slice, without
a copy, and no shape needs weights of its own. Plans that keep others (cuts within KV groups, no strategy) gather rows
at every use. o_proj and down_proj are held transposed, so that their kept *columns* are rows too.

What lies between the matrices is that of `model/function.py`; the tests hold the whole against transformers' models.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from amoeba_export.finetune.rows import HeldOrder, Kept, Projection, contract, expand, held, rows_of
from amoeba_export.finetune.smol import LowRank, Pair
from amoeba_export.ir import Architecture, Axis, Family, LayerPlan, Role, Strategy, SubnetPlan
from amoeba_export.ir.family import LAYER_ROLES, LINEARS
from amoeba_export.model.bias import imported_bias, input_means
from amoeba_export.model.experts import mixed, route
from amoeba_export.model.function import ACTIVATIONS, Place, attention

Frozen = Callable[..., nn.Parameter]
"""Reads a source weight as a parameter that is not trained: `(name, order=None, *, transposed=False)`."""


@dataclass(frozen=True, slots=True, eq=False)
class LayerCut:
    """What one kept layer keeps, on the model's device.

    Attributes:
        query, kv, ffn: Kept rows of Q, of K * H, and of F.
        experts: Kept rows of the router, or None without one.
        o_bias_D, down_bias_D: Compensation, or None.
    """

    plan: LayerPlan
    query: Kept
    kv: Kept
    ffn: Kept
    experts: Kept | None
    o_bias_D: torch.Tensor | None
    down_bias_D: torch.Tensor | None


class SlicedLayer(nn.Module):
    """One layer's frozen weights, and its function for any cut of them.

    Args:
        family: Names the weights.
        architecture: Of the supernet.
        layer: Its index there.
        frozen: Reads the weights.
        strategy: Says which heads and neurons come first.
    """

    def __init__(
        self, family: Family, architecture: Architecture, layer: int, frozen: Frozen, strategy: Strategy | None
    ) -> None:
        super().__init__()
        self.architecture = architecture
        self._family, self._layer = family, layer
        self._has = {(t.role, t.name.rpartition(".")[2]) for t in family.layer if architecture.has(t)}
        groups_K, units_F = _best_first(strategy, architecture, layer)
        self._head_order = HeldOrder(rows_of(groups_K, architecture.heads_per_kv), architecture.head_dim)
        self._group_order = HeldOrder(groups_K, architecture.head_dim)
        self._neuron_order = HeldOrder(units_F, architecture.unit_size)
        self._expert_order = HeldOrder(units_F, 1)
        query, kv, ffn = self._head_order.rows, self._group_order.rows, self._neuron_order.rows
        self.q_QD = frozen(family.weight("q", layer), query)
        self.k_KD = frozen(family.weight("k", layer), kv)
        self.v_KD = frozen(family.weight("v", layer), kv)
        self.o_QD = frozen(family.weight("o", layer), query, transposed=True)
        self.gate_FD = frozen(family.weight("gate", layer), ffn)
        self.up_FD = frozen(family.weight("up", layer), ffn)
        self.down_FD = frozen(family.weight("down", layer), ffn, transposed=True)
        self.router_ED = frozen(family.weight("router", layer), self._expert_order.rows) if family.experts else None
        rows = dict(zip(LINEARS, (query, kv, kv, None, ffn, ffn, None), strict=True))
        self._biases = nn.ParameterDict(
            {role: frozen(family.bias(role, layer), rows[role]) for role in LINEARS if (role, "bias") in self._has}
        )
        whole = architecture.qk_norm_scope == "whole"
        orders = {"q_norm": query, "k_norm": kv} if whole else {}
        self._norms = nn.ParameterDict(
            {
                role: frozen(family.weight(role, layer), orders.get(role))
                for role in (*LAYER_ROLES["attention"], *LAYER_ROLES["ffn"])
                if role.endswith("norm") and (role, "weight") in self._has
            }
        )

    def cut(self, layer: LayerPlan, plan: SubnetPlan, strategy: Strategy | None) -> LayerCut:
        """Rows and compensation of this layer under `plan`."""
        device = self.q_QD.device
        query, kv = self._head_order.keep(layer.query_heads, device), self._group_order.keep(layer.kv_heads, device)
        ffn = self._neuron_order.keep(layer.ffn, device)
        experts = None if self.router_ED is None else self._expert_order.keep(layer.ffn, device)
        o_bias = down_bias = None
        if plan.has_o_bias(layer, self.architecture):
            o_bias = self._compensation("query", query, layer, plan, strategy)
        if plan.has_down_bias(layer, self.architecture):
            down_bias = self._compensation("ffn", ffn, layer, plan, strategy)
        return LayerCut(layer, query, kv, ffn, experts, o_bias, down_bias)

    def _compensation(
        self, axis: Axis, kept: Kept, layer: LayerPlan, plan: SubnetPlan, strategy: Strategy | None
    ) -> torch.Tensor:
        """`compensation_bias` [D] of a weight that is held here, best inputs first."""
        w_ID, order = (self.o_QD, self._head_order) if axis == "query" else (self.down_FD, self._neuron_order)
        bias_D = imported_bias(axis, layer, plan, strategy)
        if bias_D is None:
            removed_I = input_means(axis, layer, strategy)
            removed_I = (removed_I if order.rows is None else removed_I[order.rows]).to(w_ID.device)
            removed_I[kept.held] = 0.0
            bias_D = removed_I @ w_ID.float()
        return bias_D.to(device=w_ID.device, dtype=w_ID.dtype)

    def forward(self, x_BTD: torch.Tensor, place: Place, cut: LayerCut, low_rank: LowRank) -> torch.Tensor:
        """The residual stream after this layer. A block without heads or neurons adds what its output bias makes."""
        o_bias_D, down_bias_D = _sum(self._bias("o"), cut.o_bias_D), _sum(self._bias("down"), cut.down_bias_D)
        attn = self._attention(x_BTD, place, cut, low_rank, o_bias_D) if cut.plan.query_heads else o_bias_D
        x_BTD = self._add(x_BTD, attn, "attn_out_norm")
        ffn = self._ffn(x_BTD, cut, low_rank, down_bias_D) if cut.plan.ffn else down_bias_D
        return self._add(x_BTD, ffn, "ffn_out_norm")

    def _add(self, x_BTD: torch.Tensor, written: torch.Tensor | None, norm: Role) -> torch.Tensor:
        if written is None:
            return x_BTD
        written, scale = self._norm(norm, written), self.architecture.residual_scale
        return x_BTD + (written if scale == 1.0 else written * scale)

    def _norm(self, role: Role, x: torch.Tensor) -> torch.Tensor:
        """A norm of this layer, or `x` where it has none."""
        if role not in self._norms:
            return x
        return rms_norm(x, self._norms[role], self.architecture.norm_eps, self.architecture.norm_offset)

    def _bias(self, role: Role) -> torch.Tensor | None:
        bias: torch.Tensor | None = self._biases.get(role)
        return bias

    def _pair(self, role: Role, low_rank: LowRank) -> Pair | None:
        return low_rank(self._family.module(role, self._layer))

    def _attention(
        self, x_BTD: torch.Tensor, place: Place, cut: LayerCut, low_rank: LowRank, bias_D: torch.Tensor | None
    ) -> torch.Tensor:
        q, k, v = expand(
            self._norm("attn_in_norm", x_BTD),
            Projection(self.q_QD, self._bias("q"), cut.query, self._pair("q", low_rank)),
            Projection(self.k_KD, self._bias("k"), cut.kv, self._pair("k", low_rank)),
            Projection(self.v_KD, self._bias("v"), cut.kv, self._pair("v", low_rank)),
        )
        has_norms = "q_norm" in self._norms
        y_BTQ = attention(
            q,
            k,
            v,
            self.architecture,
            place,
            q_norm=functools.partial(self._norm, "q_norm") if has_norms else None,
            k_norm=functools.partial(self._norm, "k_norm") if has_norms else None,
        )
        return contract(y_BTQ, self.o_QD, bias_D, cut.query, self._pair("o", low_rank))

    def _ffn(self, x_BTD: torch.Tensor, cut: LayerCut, low_rank: LowRank, bias_D: torch.Tensor | None) -> torch.Tensor:
        if cut.experts is not None:
            return self._mixed(self._norm("ffn_in_norm", x_BTD), cut, cut.experts)
        gate, up = expand(
            self._norm("ffn_in_norm", x_BTD),
            Projection(self.gate_FD, self._bias("gate"), cut.ffn, self._pair("gate", low_rank)),
            Projection(self.up_FD, self._bias("up"), cut.ffn, self._pair("up", low_rank)),
        )
        act = ACTIVATIONS[self.architecture.activation]
        return contract(act(gate) * up, self.down_FD, bias_D, cut.ffn, self._pair("down", low_rank))

    def _mixed(self, x_BTD: torch.Tensor, cut: LayerCut, kept: Kept) -> torch.Tensor:
        """What the kept experts give. Nothing of them is trained."""
        assert self.router_ED is not None
        share_BTK, picked_BTK = route(functional.linear(x_BTD, held(self.router_ED, kept)), self.architecture)
        gate_FD, up_FD, down_FD = (held(weight, cut.ffn) for weight in (self.gate_FD, self.up_FD, self.down_FD))
        act, size = ACTIVATIONS[self.architecture.activation], self.architecture.unit_size

        def expert(index: int, x_TD: torch.Tensor) -> torch.Tensor:
            own = slice(index * size, (index + 1) * size)
            return (act(functional.linear(x_TD, gate_FD[own])) * functional.linear(x_TD, up_FD[own])) @ down_FD[own]

        return mixed(x_BTD, share_BTK, picked_BTK, expert)


def _best_first(strategy: Strategy | None, architecture: Architecture, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
    """KV groups [K] and units of the FFN [F] of a layer, from those that most plans keep to those that fewest do."""
    heads_N, ffn_F = np.zeros(architecture.num_heads), np.zeros(architecture.ffn_size)
    if strategy is not None and strategy.importance is not None:
        heads_N, ffn_F = strategy.importance.heads_LN[layer], strategy.importance.ffn_LF[layer]
    elif strategy is not None:
        for width in strategy.widths.values():
            heads_N, ffn_F = heads_N + width.heads_LN[layer], ffn_F + width.ffn_LF[layer]
    groups_K = heads_N.reshape(architecture.num_kv_heads, -1).mean(axis=1)
    orders = (np.argsort(-scores, kind="stable") for scores in (groups_K, ffn_F))
    groups, neurons = (torch.from_numpy(order) for order in orders)
    return groups, neurons


def _sum(source: torch.Tensor | None, compensation: torch.Tensor | None) -> torch.Tensor | None:
    if source is None or compensation is None:
        return compensation if source is None else source
    return source + compensation


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float, offset: float = 0.0) -> torch.Tensor:
    """Root-mean-square norm over the last axis, in fp32, rounded before it is multiplied by offset + weight.

    There is no gradient for the weight, which is frozen.
    """
    weight = weight + offset if offset else weight
    y: torch.Tensor = _RmsNorm.apply(x, weight, eps)  # type: ignore[no-untyped-call]
    return y


class _RmsNorm(torch.autograd.Function):
    """Four passes backward; derived from the forward's operators, torch takes a dozen."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        wide = x.float()
        scale = torch.rsqrt(torch.linalg.vecdot(wide, wide) / wide.shape[-1] + eps)[..., None]
        normed = wide * scale
        ctx.save_for_backward(normed, scale, weight)
        return weight * normed.to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *incoming: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        normed, scale, weight = ctx.saved_tensors
        change = (incoming[0] * weight).float()
        along = torch.linalg.vecdot(change, normed)[..., None] / normed.shape[-1]
        return torch.addcmul(change, normed, along, value=-1).mul_(scale).to(incoming[0].dtype), None, None
