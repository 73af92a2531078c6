"""What a subnet is trained on: labels for the full net, the full net's logits for the others.

P positions whose logits are needed, V vocabulary, B batch, T tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn import functional

from amoeba_export.finetune.settings import MaskForm, ObjectiveSettings

IGNORED = -100
"""Label of a token that is not trained on, as transformers has it."""


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


def soft_cross_entropy(
    student_PV: torch.Tensor,
    teacher_PV: torch.Tensor,
    *,
    mask_P: torch.Tensor | None = None,
    temperature: float = 1.0,
) -> torch.Tensor:
    """Mean over positions of -sum_v softmax(teacher / T)_v log softmax(student / T)_v.

    It differs from the KL divergence by the teacher's entropy, which is a constant of the student (upstream
    `trainer.py`, `KLLossSoft`). Not multiplied by T squared.

    Args:
        student_PV: Logits, any leading shape.
        teacher_PV: Logits of the same shape; no gradient flows into them.
        mask_P: Positions that count, or None for all.
        temperature: T.
    """
    probs_PV = functional.softmax(teacher_PV.detach() / temperature, dim=-1)
    return _against(probs_PV, functional.log_softmax(student_PV / temperature, dim=-1), mask_P)


def _against(probs_PV: torch.Tensor, log_probs_PV: torch.Tensor, mask_P: torch.Tensor | None) -> torch.Tensor:
    loss_P = -(probs_PV * log_probs_PV).sum(dim=-1)
    return loss_P.mean() if mask_P is None else (loss_P * mask_P).sum() / mask_P.sum()


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

    Passes over [P, V] are what a loss costs: each subnet's log-probabilities are computed once for both losses (at
    temperature 1), and the teacher's probabilities once for all subnets.
    """

    def __init__(self, settings: ObjectiveSettings, positions: Positions) -> None:
        self._settings = settings
        self._positions = positions
        self._teacher_PV: torch.Tensor | None = None
        self._reference: torch.Tensor | None = None

    def __call__(self, logits_PV: torch.Tensor) -> SubnetLoss:
        """Loss of the next subnet from its fp32 logits at `positions.select_BT`.

        Balancing scales a loss to the first one's magnitude: loss * stop(first / loss).
        """
        settings, positions = self._settings, self._positions
        log_probs_PV = functional.log_softmax(logits_PV, dim=-1)
        cross_entropy = functional.nll_loss(log_probs_PV, positions.targets_P, ignore_index=IGNORED)
        softened_PV = log_probs_PV
        if settings.temperature != 1.0:
            softened_PV = functional.log_softmax(logits_PV / settings.temperature, dim=-1)
        if self._teacher_PV is None:
            self._teacher_PV, self._reference = softened_PV.detach().exp(), cross_entropy.detach()
            return SubnetLoss(cross_entropy, cross_entropy.detach(), cross_entropy.detach(), None)
        assert self._reference is not None
        distillation = _against(self._teacher_PV, softened_PV, positions.distill_P)
        raw = distillation
        if settings.kd_weight != 1.0:
            raw = settings.kd_weight * distillation + (1 - settings.kd_weight) * cross_entropy
        total = raw * (self._reference / raw.detach()) if settings.balance else raw
        return SubnetLoss(total, raw.detach(), cross_entropy.detach(), distillation.detach())
