"""An FFN of experts: a router picks a few of them for each token.

B batch, T tokens, K experts of a token, F neurons of one expert, D hidden.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from amoeba_export.ir import Architecture

Heard = Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor], None]
"""Is told of each expert: its index, which tokens of the batch it was picked for, its share of each, what it gives."""


def route(scores_BTE: torch.Tensor, architecture: Architecture) -> tuple[torch.Tensor, torch.Tensor]:
    """The experts of each token and their shares. Both [B, T, K]; K is less where fewer experts are left.

    As transformers' Qwen3-MoE: softmax over all experts, then the largest ones, then their sum divided away.
    """
    shares_BTE = torch.softmax(scores_BTE, dim=-1, dtype=torch.float32)
    share_BTK, picked_BTK = shares_BTE.topk(min(architecture.experts_per_token, scores_BTE.shape[-1]), dim=-1)
    if architecture.shares_sum_to_one:
        share_BTK = share_BTK / share_BTK.sum(dim=-1, keepdim=True)
    return share_BTK.to(scores_BTE.dtype), picked_BTK


def mixed(
    x_BTD: torch.Tensor,
    share_BTK: torch.Tensor,
    picked_BTK: torch.Tensor,
    expert: Callable[[int, torch.Tensor], torch.Tensor],
    *,
    heard: Heard | None = None,
) -> torch.Tensor:
    """The sum of what each token's experts give, by their shares. [B, T, D].

    Args:
        x_BTD: What enters the experts.
        share_BTK: See `route`.
        picked_BTK: See `route`.
        expert: Computes an expert, by its index, for some tokens: [T, D] -> [T, D].
        heard: See `Heard`.
    """
    x_TD, share_TK, picked_TK = (x.flatten(0, 1) for x in (x_BTD, share_BTK, picked_BTK))
    mixed_TD = torch.zeros_like(x_TD)
    for index in sorted(set(picked_TK.flatten().tolist())):
        tokens, ranks = (picked_TK == index).nonzero(as_tuple=True)
        given_TD, share_T = expert(index, x_TD[tokens]), share_TK[tokens, ranks]
        if heard is not None:
            heard(index, tokens, share_T, given_TD)
        mixed_TD.index_add_(0, tokens, given_TD * share_T[:, None])
    return mixed_TD.view_as(x_BTD)
