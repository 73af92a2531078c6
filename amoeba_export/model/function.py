"""What a layer computes between its matrices, for every family: norms, RoPE, attention, activation.

B batch, T tokens, N query heads, K KV heads, H head dim. All engines of ours in torch call these; the operations and
their order are those of transformers, so that results agree to the bit where the dtype does.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch.nn import functional

from amoeba_export.ir import Architecture
from amoeba_export.ir.family import Activation, QueryTemperature

MAX_GQA_DIM = 256
"""Head dim up to which torch's attention shares KV heads without a mask (transformers' `use_gqa_in_sdpa`)."""

NormFunction = Callable[[torch.Tensor, torch.Tensor, float], torch.Tensor]

ACTIVATIONS: Mapping[Activation, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": functional.silu,
    "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh"),
}


@dataclass(frozen=True, slots=True, eq=False)
class Place:
    """Where tokens stand, for layers of one kind.

    Attributes:
        cos, sin: Of RoPE [B or 1, T, R]; None: q and k are not rotated.
        mask: Who sees whom, bool [B or 1, 1, T, T]; None: each token sees itself and all before it.
        temperature_BT: What queries are multiplied by, or None.
    """

    cos: torch.Tensor | None
    sin: torch.Tensor | None
    mask: torch.Tensor | None
    temperature_BT: torch.Tensor | None = None


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float, offset: float = 0.0) -> torch.Tensor:
    """Root-mean-square norm over the last axis, times (offset + weight).

    In fp32; without an offset it is rounded before the weight (Llama), with one after it (Gemma).
    """
    wide = x.to(torch.float32)
    normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    if not offset:
        return weight * normed.to(x.dtype)
    return (normed * (offset + weight.float())).type_as(x)


def temperature_at(temperature: QueryTemperature | None, positions_BT: torch.Tensor) -> torch.Tensor | None:
    """What queries at these positions are multiplied by. [B, T]."""
    if temperature is None:
        return None
    return 1 + temperature.beta * torch.log(1 + torch.floor(positions_BT / temperature.length))


def attention(
    q_BTQ: torch.Tensor,
    k_BTK: torch.Tensor,
    v_BTK: torch.Tensor,
    architecture: Architecture,
    place: Place,
    *,
    q_norm: Callable[[torch.Tensor], torch.Tensor] | None = None,
    k_norm: Callable[[torch.Tensor], torch.Tensor] | None = None,
) -> torch.Tensor:
    """From what q, k and v give to what enters o. [B, T, N * H].

    Args:
        q_BTQ: [B, T, N * H].
        k_BTK: [B, T, K * H].
        v_BTK: [B, T, K * H].
        architecture: Of the supernet; how many heads there are follows from the shapes.
        place: Where the tokens stand.
        q_norm: Norm of q, per head or over all of them; None where there is none.
        k_norm: Likewise.
    """
    shape = (*q_BTQ.shape[:2], -1, architecture.head_dim)
    if architecture.qk_norm_scope == "whole" and q_norm and k_norm:
        q_BTQ, k_BTK = q_norm(q_BTQ), k_norm(k_BTK)
    q, k, v = (x.view(shape) for x in (q_BTQ, k_BTK, v_BTK))
    if architecture.qk_norm_scope == "head" and q_norm and k_norm:
        q, k = q_norm(q), k_norm(k)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    if place.cos is not None and place.sin is not None:
        q, k = (_rotated(x, place.cos[:, None], place.sin[:, None]) for x in (q, k))
    if place.temperature_BT is not None:
        q = q * place.temperature_BT[:, None, :, None].to(q.dtype)
    y = _attend(q, k, v, place.mask, scale=architecture.score_scale, softcap=architecture.attention_softcap)
    return y.transpose(1, 2).flatten(2)


def _rotated(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """RoPE over the leading dims that there are angles for."""
    dims = cos.shape[-1]
    turned = x if dims == x.shape[-1] else x[..., :dims]
    first, second = turned[..., : dims // 2], turned[..., dims // 2 :]
    turned = turned * cos + torch.cat((-second, first), dim=-1) * sin
    return turned if dims == x.shape[-1] else torch.cat([turned, x[..., dims:]], dim=-1)


def _attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None,
    *,
    scale: float,
    softcap: float | None,
) -> torch.Tensor:
    """Scaled dot products, softmax, sum of values. [B, N, T, H]."""
    group = q.shape[1] // k.shape[1]
    if softcap is not None:
        k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
        return _capped(q, k, v, mask, scale=scale, softcap=softcap)
    shares = group > 1 and mask is None and q.shape[-1] <= MAX_GQA_DIM
    if group > 1 and not shares:
        k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    return functional.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=mask is None and q.shape[2] > 1, scale=scale, enable_gqa=shares
    )


def _capped(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, *, scale: float, softcap: float
) -> torch.Tensor:
    """Attention whose scores s become softcap * tanh(s / softcap): torch's own has no such thing."""
    scores = softcap * torch.tanh((q @ k.transpose(2, 3)) * scale / softcap)
    if mask is None:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril()
    scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    return torch.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype) @ v


def capped_logits(logits: torch.Tensor, architecture: Architecture) -> torch.Tensor:
    """What the head gives, divided and capped as the family does."""
    if architecture.logits_divisor != 1.0:
        logits = logits / architecture.logits_divisor
    if (cap := architecture.final_softcap) is not None:
        logits = cap * torch.tanh(logits / cap)
    return logits
