"""What a subnet is trained on: labels for the full net, the full net's logits for the others.

P positions whose logits are needed, C of them in a chunk, V vocabulary, D hidden, B batch, T tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional

from amoeba_export.finetune.settings import MaskForm, ObjectiveSettings

IGNORED = -100
"""Label of a token that is not trained on, as transformers has it."""

CHUNK_LOGITS = 1 << 22
"""Logits computed at a time: few enough to stay near the cores (16 MB), enough for a product at full speed."""


@dataclass(frozen=True, slots=True, eq=False)
class Positions:
    """Where a batch has something to learn. Logits are computed there and nowhere else.

    Attributes:
        select_BT: Positions whose logits are needed.
        targets_P: The next token at each of them, or `IGNORED` where cross-entropy does not count.
        distill_P: Where distillation counts.
    """

    select_BT: torch.Tensor
    targets_P: torch.Tensor
    distill_P: torch.Tensor

    @classmethod
    def of(cls, labels_BT: torch.Tensor, mask: MaskForm = "shifted") -> Positions:
        """The positions of `labels_BT`, in which every token that is not trained on is `IGNORED`.

        Cross-entropy always counts where the *next* token is a label. With `shifted`, distillation counts there too;
        with `unshifted`, where the token itself is one.
        """
        next_BT = functional.pad(labels_BT[:, 1:], (0, 1), value=IGNORED)
        predicts_BT = next_BT != IGNORED
        distill_BT = predicts_BT if mask == "shifted" else labels_BT != IGNORED
        select_BT = predicts_BT | distill_BT
        return cls(select_BT, next_BT[select_BT], distill_BT[select_BT])


@dataclass(frozen=True, slots=True, eq=False)
class SubnetLoss:
    """One subnet's losses on one micro-batch.

    Attributes:
        total: What is differentiated: mixed, and balanced where asked for.
        raw: The mixed loss before balancing.
        cross_entropy: On labels.
        distillation: Against the first subnet; None for the first.
    """

    total: torch.Tensor
    raw: torch.Tensor
    cross_entropy: torch.Tensor
    distillation: torch.Tensor | None


class Objective:
    """The losses of the subnets of one micro-batch, in order: the first one teaches, the others follow.

    Distillation is the cross-entropy -sum_v softmax(teacher / T)_v log softmax(student / T)_v, which differs from the
    KL divergence by a constant of the student (upstream `trainer.py`, `KLLossSoft`). It is not multiplied by T squared.

    Logits are the widest tensor of a small model, and passes over them are what a loss costs. So the head and the loss
    are one: for a chunk of positions at a time, logits, both losses and the gradient of the hidden states are computed
    while they are near the cores, and forgotten. Only the teacher's probabilities stay, where subnets follow it.
    (torch's `linear_cross_entropy` does this for labels alone.)

    Args:
        settings: Weight of distillation, temperature, balancing.
        positions: Where the losses count.
        head_VD: The vocabulary head. It is frozen: there is no gradient for it.
        num_followers: How many subnets come after the first.
    """

    def __init__(
        self, settings: ObjectiveSettings, positions: Positions, head_VD: torch.Tensor, *, num_followers: int
    ) -> None:
        self._settings = settings
        self._positions = positions
        self._head_VD = head_VD
        self._reference: torch.Tensor | None = None
        taught = len(positions.targets_P) if num_followers else 0
        self._teacher_PV = torch.empty(taught, len(head_VD), dtype=torch.float32, device=head_VD.device)

    def __call__(self, hidden_PD: torch.Tensor) -> SubnetLoss:
        """Loss of the next subnet from its last hidden states at `positions.select_BT`.

        Balancing scales a loss to the first one's magnitude: loss * stop(first / loss).
        """
        settings, reference = self._settings, self._reference
        if reference is None:
            cross_entropy, _, gradient_PD = self._sweep(hidden_PD.detach(), kd_weight=0.0)
            self._reference = cross_entropy
            total = _differentiated(hidden_PD, cross_entropy, gradient_PD)
            return SubnetLoss(total, cross_entropy, cross_entropy, None)
        kd_weight = settings.kd_weight
        cross_entropy, distillation, gradient_PD = self._sweep(hidden_PD.detach(), kd_weight=kd_weight)
        raw = distillation
        if kd_weight != 1.0:
            raw = kd_weight * distillation + (1 - kd_weight) * cross_entropy
        total = _differentiated(hidden_PD, raw, gradient_PD)
        if settings.balance:
            total = total * (reference / raw)
        return SubnetLoss(total, raw, cross_entropy, distillation)

    @torch.no_grad()
    def _sweep(self, hidden_PD: torch.Tensor, *, kd_weight: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Cross-entropy, distillation (0 for the teacher), and the gradient of the mixture in the hidden states."""
        positions, temperature = self._positions, self._settings.temperature
        teaches = self._reference is None
        ce_share_P = _shares(positions.targets_P != IGNORED)
        kd_share_P = _shares(positions.distill_P)
        targets_P = positions.targets_P.clamp(min=0)
        cross_entropy_P, distillation_P = torch.empty_like(ce_share_P), torch.zeros_like(kd_share_P)
        gradient_PD = torch.empty_like(hidden_PD)
        for chunk in _chunks(len(hidden_PD), len(self._head_VD)):
            targets_C1 = targets_P[chunk, None]
            ce_weight_C1 = (1 - kd_weight) * ce_share_P[chunk, None]
            logits_CV = functional.linear(hidden_PD[chunk], self._head_VD).float()
            probs_CV, norm_C = _softmax(logits_CV)
            cross_entropy_P[chunk] = norm_C - logits_CV.gather(1, targets_C1)[:, 0]
            soft_CV, soft_norm_C = probs_CV, norm_C
            if temperature != 1.0:
                soft_CV, soft_norm_C = _softmax(logits_CV.div_(temperature))
            change_CV = probs_CV * ce_weight_C1
            change_CV.scatter_add_(1, targets_C1, -ce_weight_C1)
            if not teaches:
                teacher_CV = self._teacher_PV[chunk]
                distillation_P[chunk] = soft_norm_C - torch.linalg.vecdot(teacher_CV, logits_CV)
                kd_weight_C1 = kd_weight / temperature * kd_share_P[chunk, None]
                change_CV.addcmul_(soft_CV, kd_weight_C1).addcmul_(teacher_CV, -kd_weight_C1)
            elif len(self._teacher_PV):
                self._teacher_PV[chunk] = soft_CV
            gradient_PD[chunk] = change_CV.to(self._head_VD.dtype) @ self._head_VD
        return cross_entropy_P @ ce_share_P, distillation_P @ kd_share_P, gradient_PD


def _shares(counts_P: torch.Tensor) -> torch.Tensor:
    """What each position contributes to a mean over those that count, fp32."""
    return counts_P / counts_P.sum()


def _chunks(num_positions: int, vocab_size: int) -> Iterator[slice]:
    size = max(1, CHUNK_LOGITS // vocab_size)
    return (slice(start, start + size) for start in range(0, num_positions, size))


def _softmax(logits_CV: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Probabilities, and the logarithm of what they were divided by [C]; `logits_CV` gets the maximum 0 on the way."""
    logits_CV -= logits_CV.amax(dim=1, keepdim=True)
    probs_CV = logits_CV.exp()
    sum_C1 = probs_CV.sum(dim=1, keepdim=True)
    return probs_CV.div_(sum_C1), sum_C1.log()[:, 0]


def _differentiated(hidden_PD: torch.Tensor, loss: torch.Tensor, gradient_PD: torch.Tensor) -> torch.Tensor:
    """`loss`, such that its gradient in `hidden_PD` is `gradient_PD`."""
    known: torch.Tensor = _Differentiated.apply(hidden_PD, loss, gradient_PD)  # type: ignore[no-untyped-call]
    return known


class _Differentiated(torch.autograd.Function):
    """A loss whose gradient is known already."""

    @staticmethod
    def forward(ctx: Any, hidden_PD: torch.Tensor, loss: torch.Tensor, gradient_PD: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(gradient_PD)
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, *incoming: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (gradient_PD,) = ctx.saved_tensors
        return gradient_PD * incoming[0], None, None
