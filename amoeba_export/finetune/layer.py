"""One layer of the supernet that runs with any of its heads and neurons: gathered, not multiplied by zero.

B batch, T tokens, D hidden, F FFN, N query heads, K KV heads, H head dim, Q = N * H, R rank, O out, I in features.

The base weights are frozen, and cut by gathering rows at every use: a copy that costs little beside the products that
it saves, and no shape needs weights of its own. o_proj and down_proj are held transposed, so that their kept *columns*
are rows too (a column gather took 9 times as long on a CPU).

The four families share this function (transformers' `modeling_{llama,mistral,qwen2,qwen3}.py`); the tests hold it
against each of them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from amoeba_export.errors import InputError
from amoeba_export.finetune.smol import LowRank, Pair
from amoeba_export.ir import Architecture, LayerPlan, Strategy, SubnetPlan

Frozen = Callable[..., nn.Parameter]
"""Reads a source weight as a parameter that is not trained: `(name, *, transposed=False)`."""


@dataclass(frozen=True, slots=True, eq=False)
class LayerCut:
    """What one kept layer keeps, as row indices on the model's device; None where it keeps all.

    Attributes:
        query, kv, ffn: Kept rows of Q, of K * H, and of F.
        o_bias_D, down_bias_D: Compensation, or None.
    """

    plan: LayerPlan
    query: torch.Tensor | None
    kv: torch.Tensor | None
    ffn: torch.Tensor | None
    o_bias_D: torch.Tensor | None
    down_bias_D: torch.Tensor | None


class SlicedLayer(nn.Module):
    """One layer's frozen weights, and its function for any cut of them."""

    def __init__(self, architecture: Architecture, layer: int, frozen: Frozen) -> None:
        super().__init__()
        self.architecture = architecture
        self.name = f"model.layers.{layer}"
        attn, mlp = f"{self.name}.self_attn", f"{self.name}.mlp"
        self.input_norm_D = frozen(f"{self.name}.input_layernorm.weight")
        self.post_norm_D = frozen(f"{self.name}.post_attention_layernorm.weight")
        self.q_QD = frozen(f"{attn}.q_proj.weight")
        self.k_KD = frozen(f"{attn}.k_proj.weight")
        self.v_KD = frozen(f"{attn}.v_proj.weight")
        self.o_QD = frozen(f"{attn}.o_proj.weight", transposed=True)
        self.gate_FD = frozen(f"{mlp}.gate_proj.weight")
        self.up_FD = frozen(f"{mlp}.up_proj.weight")
        self.down_FD = frozen(f"{mlp}.down_proj.weight", transposed=True)
        qkv, ffn = architecture.qkv_bias, architecture.mlp_bias
        self.q_bias = frozen(f"{attn}.q_proj.bias") if qkv else None
        self.k_bias = frozen(f"{attn}.k_proj.bias") if qkv else None
        self.v_bias = frozen(f"{attn}.v_proj.bias") if qkv else None
        self.o_bias = frozen(f"{attn}.o_proj.bias") if architecture.o_bias else None
        self.gate_bias = frozen(f"{mlp}.gate_proj.bias") if ffn else None
        self.up_bias = frozen(f"{mlp}.up_proj.bias") if ffn else None
        self.down_bias = frozen(f"{mlp}.down_proj.bias") if ffn else None
        self.q_norm_H = frozen(f"{attn}.q_norm.weight") if architecture.qk_norm else None
        self.k_norm_H = frozen(f"{attn}.k_norm.weight") if architecture.qk_norm else None

    def cut(self, layer: LayerPlan, plan: SubnetPlan, strategy: Strategy | None) -> LayerCut:
        """Indices and compensation of this layer under `plan`."""
        architecture, device = self.architecture, self.q_QD.device
        query = _rows(layer.query_heads, architecture.num_heads, architecture.head_dim, device)
        kv = _rows(layer.kv_heads, architecture.num_kv_heads, architecture.head_dim, device)
        ffn = _rows(layer.ffn, architecture.ffn_size, 1, device)
        o_bias = down_bias = None
        if plan.has_o_bias(layer, architecture):
            o_bias = _compensation(self.o_QD, query, layer.source_layer, "o", plan, strategy)
        if plan.has_down_bias(layer, architecture):
            down_bias = _compensation(self.down_FD, ffn, layer.source_layer, "down", plan, strategy)
        return LayerCut(layer, query, kv, ffn, o_bias, down_bias)

    def forward(
        self,
        x_BTD: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        mask: torch.Tensor | None,
        cut: LayerCut,
        low_rank: LowRank,
    ) -> torch.Tensor:
        """The residual stream after this layer. A block without heads or neurons adds its output bias, if any."""
        o_bias_D, down_bias_D = _sum(self.o_bias, cut.o_bias_D), _sum(self.down_bias, cut.down_bias_D)
        attn = self._attention(x_BTD, cos, sin, mask, cut, low_rank, o_bias_D) if cut.plan.query_heads else o_bias_D
        if attn is not None:
            x_BTD = x_BTD + attn
        ffn = self._ffn(x_BTD, cut, low_rank, down_bias_D) if cut.plan.ffn else down_bias_D
        return x_BTD if ffn is None else x_BTD + ffn

    def _attention(
        self,
        x_BTD: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        mask: torch.Tensor | None,
        cut: LayerCut,
        low_rank: LowRank,
        bias_D: torch.Tensor | None,
    ) -> torch.Tensor:
        eps, name = self.architecture.norm_eps, f"{self.name}.self_attn"
        heads = (*x_BTD.shape[:2], -1, self.architecture.head_dim)
        h_BTD = rms_norm(x_BTD, self.input_norm_D, eps)
        q, k, v = (
            y.view(heads)
            for y in _expand(
                h_BTD,
                Projection(self.q_QD, self.q_bias, cut.query, low_rank(f"{name}.q_proj")),
                Projection(self.k_KD, self.k_bias, cut.kv, low_rank(f"{name}.k_proj")),
                Projection(self.v_KD, self.v_bias, cut.kv, low_rank(f"{name}.v_proj")),
            )
        )
        if self.q_norm_H is not None and self.k_norm_H is not None:
            q, k = rms_norm(q, self.q_norm_H, eps), rms_norm(k, self.k_norm_H, eps)
        q, k = apply_rotary_pos_emb(q.transpose(1, 2), k.transpose(1, 2), cos, sin)
        y = functional.scaled_dot_product_attention(
            q, k, v.transpose(1, 2), attn_mask=mask, is_causal=mask is None, enable_gqa=True
        )
        y_BTQ = y.transpose(1, 2).flatten(2)
        return _contract(y_BTQ, self.o_QD, bias_D, cut.query, low_rank(f"{name}.o_proj"))

    def _ffn(self, x_BTD: torch.Tensor, cut: LayerCut, low_rank: LowRank, bias_D: torch.Tensor | None) -> torch.Tensor:
        name = f"{self.name}.mlp"
        h_BTD = rms_norm(x_BTD, self.post_norm_D, self.architecture.norm_eps)
        gate, up = _expand(
            h_BTD,
            Projection(self.gate_FD, self.gate_bias, cut.ffn, low_rank(f"{name}.gate_proj")),
            Projection(self.up_FD, self.up_bias, cut.ffn, low_rank(f"{name}.up_proj")),
        )
        return _contract(functional.silu(gate) * up, self.down_FD, bias_D, cut.ffn, low_rank(f"{name}.down_proj"))


class Projection(NamedTuple):
    """A linear weight [O, I] with its bias [O], the rows of both that are kept, and the weight's low-rank change."""

    w_OI: torch.Tensor
    bias_O: torch.Tensor | None
    rows: torch.Tensor | None
    pair: Pair | None


def _expand(x_BTI: torch.Tensor, *projections: Projection) -> list[torch.Tensor]:
    """X @ W[rows].T + bias[rows] for each, with the low-rank change of those rows. All A are one product."""
    ys = [
        functional.linear(x_BTI, _take(one.w_OI, one.rows), None if one.bias_O is None else _take(one.bias_O, one.rows))
        for one in projections
    ]
    changed = [(i, one.rows, one.pair) for i, one in enumerate(projections) if one.pair is not None]
    if not changed:
        return ys
    a_RI = torch.cat([a_RI for _, _, (a_RI, _) in changed])
    low_BTR = functional.linear(x_BTI, a_RI.to(x_BTI.dtype))
    parts = torch.split(low_BTR, [len(a_RI) for _, _, (a_RI, _) in changed], dim=-1)
    for (i, rows, (_, b_OR)), part_BTR in zip(changed, parts, strict=True):
        ys[i] = _add_product(ys[i], part_BTR, _take(b_OR, rows))
    return ys


def _contract(
    x_BTI: torch.Tensor, w_IO: torch.Tensor, bias_O: torch.Tensor | None, rows: torch.Tensor | None, pair: Pair | None
) -> torch.Tensor:
    """X @ W[rows] + bias for a transposed weight, of which the rows are what `x` has left."""
    y_BTO = x_BTI @ _take(w_IO, rows)
    if bias_O is not None:
        y_BTO = y_BTO + bias_O
    if pair is None:
        return y_BTO
    a_RI, b_OR = pair
    a_RI = a_RI if rows is None else a_RI.index_select(1, rows)
    return _add_product(y_BTO, functional.linear(x_BTI, a_RI.to(x_BTI.dtype)), b_OR)


def _add_product(y_BTO: torch.Tensor, low_BTR: torch.Tensor, b_OR: torch.Tensor) -> torch.Tensor:
    y = torch.addmm(y_BTO.flatten(0, 1), low_BTR.flatten(0, 1), b_OR.to(y_BTO.dtype).t())
    return y.view(y_BTO.shape)


def _take(weight: torch.Tensor, rows: torch.Tensor | None) -> torch.Tensor:
    return weight if rows is None else weight.index_select(0, rows)


def _rows(kept: tuple[int, ...], size: int, block: int, device: torch.device) -> torch.Tensor | None:
    """Row indices of the kept blocks of `block` rows, or None when all of `size` are kept."""
    if len(kept) == size:
        return None
    starts = torch.tensor(kept, dtype=torch.int64) * block
    return (starts[:, None] + torch.arange(block)).flatten().to(device)


def _sum(source: torch.Tensor | None, compensation: torch.Tensor | None) -> torch.Tensor | None:
    if source is None or compensation is None:
        return compensation if source is None else source
    return source + compensation


def _compensation(
    w_IO: torch.Tensor,
    kept: torch.Tensor | None,
    layer: int,
    which: str,
    plan: SubnetPlan,
    strategy: Strategy | None,
) -> torch.Tensor:
    """Mean contribution of the removed inputs, [D]: mean[removed] @ W[removed]; an import brings the vector itself."""
    width = strategy.widths.get(plan.width_key) if strategy and plan.width_key is not None else None
    importance = strategy.importance if strategy and plan.width_key is None else None
    if width is not None:
        bias_LD = width.o_bias_LD if which == "o" else width.down_bias_LD
        bias_D = torch.tensor(bias_LD[layer], dtype=torch.float32)
    elif importance is not None:
        means_LI = importance.o_mean_LQ if which == "o" else importance.down_mean_LF
        removed_I = torch.tensor(means_LI[layer], dtype=torch.float32, device=w_IO.device)
        if kept is not None:
            removed_I[kept] = 0.0
        bias_D = removed_I @ w_IO.float()
    else:
        raise InputError(
            f"The plan for {plan.shape} replaces removed channels by their mean, and the strategy cannot supply it.",
            next_step="Give the strategy that the plan was derived from (--strategy).",
        )
    return bias_D.to(device=w_IO.device, dtype=w_IO.dtype)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Root-mean-square norm over the last axis, in fp32, rounded before the weight as transformers does.

    There is no gradient for the weight, which is frozen.
    """
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
