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

PRODUCT_LOGITS = 1 << 26
"""Logits computed by one product: 256 MB, enough that the head's weights are not read and packed too often."""

PASS_LOGITS = 1 << 20
"""Logits that all passes visit before the next ones: few enough to stay near a CPU's cores."""


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


class Buffers:
    """Memory that is used again: fresh pages for hundreds of megabytes of logits cost as much as a pass over them."""

    def __init__(self) -> None:
        self._kept: dict[str, torch.Tensor] = {}

    def take(self, name: str, rows: int, columns: int, device: torch.device) -> torch.Tensor:
        """Fp32 [rows, columns], with whatever was in it."""
        kept = self._kept.get(name)
        if kept is None or kept.numel() < rows * columns or kept.device != device:
            self._kept[name] = kept = torch.empty(rows * columns, dtype=torch.float32, device=device)
        return kept[: rows * columns].view(rows, columns)


class TrainingLoss:
    """The losses of the subnets of one micro-batch, in order: the first one teaches, the others follow.

    Distillation is the cross-entropy -sum_v softmax(teacher / T)_v log softmax(student / T)_v, which differs from the
    KL divergence by a constant of the student (upstream `trainer.py`, `KLLossSoft`). It is not multiplied by T squared.

    Logits are the widest tensor of a small model, and passes over them are what a loss costs. So the head and the loss
    are one, for a part of the positions at a time: logits, both losses, and the gradient of the logits in their own
    place, from which that of the hidden states is one more product. Only the teacher's probabilities stay, where
    subnets follow it. (torch's `linear_cross_entropy` does this for labels alone.)

    Args:
        settings: Weight of distillation, temperature, balancing.
        positions: Where the losses count.
        head_VD: The vocabulary head. It is frozen: there is no gradient for it.
        num_followers: How many subnets come after the first.
        buffers: Those of the last micro-batch, whose losses are done with.
    """

    def __init__(
        self,
        settings: ObjectiveSettings,
        positions: Positions,
        head_VD: torch.Tensor,
        *,
        num_followers: int,
        buffers: Buffers,
    ) -> None:
        self._settings = settings
        self._positions = positions
        self._head_VD = head_VD
        self._reference: torch.Tensor | None = None
        taught = len(positions.targets_P) if num_followers else 0
        self._buffers = buffers
        self._teacher_PV = buffers.take("teacher", taught, len(head_VD), head_VD.device)

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
        positions, head_VD = self._positions, self._head_VD
        ce_share_P, kd_share_P = _shares(positions.targets_P != IGNORED), _shares(positions.distill_P)
        losses_P2 = torch.zeros(len(hidden_PD), 2, dtype=torch.float32, device=hidden_PD.device)
        gradient_PD = torch.empty_like(hidden_PD)
        for part in _parts(slice(0, len(hidden_PD)), PRODUCT_LOGITS // len(head_VD)):
            logits_CV = self._buffers.take("logits", part.stop - part.start, len(head_VD), head_VD.device)
            if head_VD.dtype == torch.float32:
                torch.mm(hidden_PD[part], head_VD.t(), out=logits_CV)
            else:
                logits_CV.copy_(functional.linear(hidden_PD[part], head_VD))
            step = PASS_LOGITS // len(head_VD) if logits_CV.device.type == "cpu" else len(logits_CV)
            for rows in _parts(part, step):
                local = slice(rows.start - part.start, rows.stop - part.start)
                losses_P2[rows] = self._differentiate(
                    logits_CV[local], rows, (1 - kd_weight) * ce_share_P[rows], kd_weight * kd_share_P[rows]
                )
            gradient_PD[part] = logits_CV.to(head_VD.dtype) @ head_VD
        return losses_P2[:, 0] @ ce_share_P, losses_P2[:, 1] @ kd_share_P, gradient_PD

    def _differentiate(
        self, logits_CV: torch.Tensor, rows: slice, ce_weight_C: torch.Tensor, kd_weight_C: torch.Tensor
    ) -> torch.Tensor:
        """Put the gradient of the weighted losses in the place of the logits of `rows`; return both losses [C, 2]."""
        temperature, teacher_PV = self._settings.temperature, self._teacher_PV
        targets_C1 = self._positions.targets_P[rows, None].clamp(min=0)
        log_probs_CV = soft_CV = functional.log_softmax(logits_CV, dim=1)
        if temperature != 1.0:
            soft_CV = functional.log_softmax(logits_CV / temperature, dim=1)
        cross_entropy_C = -log_probs_CV.gather(1, targets_C1)[:, 0]
        distillation_C = torch.zeros_like(cross_entropy_C)
        torch.exp(log_probs_CV, out=logits_CV)
        if self._reference is None:
            if len(teacher_PV):
                torch.exp(soft_CV, out=teacher_PV[rows])
            logits_CV *= ce_weight_C[:, None]
        else:
            distillation_C = -torch.linalg.vecdot(teacher_PV[rows], soft_CV)
            kd_weight_C1 = kd_weight_C[:, None] / temperature
            if temperature == 1.0:
                logits_CV *= ce_weight_C[:, None] + kd_weight_C1
            else:
                logits_CV *= ce_weight_C[:, None]
                logits_CV.addcmul_(soft_CV.exp_(), kd_weight_C1)
            logits_CV.addcmul_(teacher_PV[rows], kd_weight_C1, value=-1)
        logits_CV.scatter_add_(1, targets_C1, -ce_weight_C[:, None])
        return torch.stack([cross_entropy_C, distillation_C], dim=1)


def _shares(counts_P: torch.Tensor) -> torch.Tensor:
    """What each position contributes to a mean over those that count, fp32."""
    return counts_P / counts_P.sum()


def _parts(whole: slice, size: int) -> Iterator[slice]:
    """`whole` in parts of `size`, or of 1 if that is more."""
    size = max(1, size)
    return (slice(start, min(start + size, whole.stop)) for start in range(whole.start, whole.stop, size))


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
