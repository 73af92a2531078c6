"""One micro-batch through its subnets: forward and backward of one after the other, gradients adding up."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from transformers import get_scheduler

from amoeba_export.errors import UsageError
from amoeba_export.finetune.model import SlicedSupernet
from amoeba_export.finetune.objective import Buffers, Positions, TrainingLoss
from amoeba_export.finetune.packing import PackedBatch
from amoeba_export.finetune.settings import ObjectiveSettings, Settings
from amoeba_export.finetune.smol import TrainedLowRank
from amoeba_export.ir import Shape, SubnetPlan

Losses = list[tuple[Shape, dict[str, float]]]
"""Per subnet, in order: `loss` (before balancing), `cross_entropy`, and `distillation` for all but the first."""


@dataclass(frozen=True, slots=True, eq=False)
class SandwichStep:
    """The trained weights, the net that they change, and what each shape keeps.

    Attributes:
        plans: Every shape that can be drawn.
        loss_scale: The share of a micro-batch in its step: 1 / gradient accumulation.
        buffers: Memory that every step uses again.
    """

    model: SlicedSupernet
    low_rank: TrainedLowRank
    plans: Mapping[Shape, SubnetPlan]
    objective: ObjectiveSettings
    loss_scale: float = 1.0
    buffers: Buffers = field(default_factory=Buffers)

    def run(self, batch: PackedBatch, shapes: Sequence[Shape], *, noise: GateNoise | None = None) -> Losses:
        """Add the gradients of `batch` under `shapes`, the first of which is trained on labels and teaches the others.

        Raises:
            UsageError: A loss that is not finite.
        """
        positions = Positions.of(batch.labels_BT, self.objective.mask)
        objective = TrainingLoss(
            self.objective, positions, self.model.head_VD, num_followers=len(shapes) - 1, buffers=self.buffers
        )
        losses: Losses = []
        for i, shape in enumerate(shapes):
            plan = self.plans[shape]
            hidden_PD = self.model(
                batch.input_ids_BT,
                cut=self.model.cut(plan),
                low_rank=self.low_rank.at(plan, noise_E=noise.draw(i) if noise else None),
                select_BT=positions.select_BT,
                segments_BT=batch.segments_BT,
            )
            loss = objective(hidden_PD)
            entry = {"loss": loss.raw.item(), "cross_entropy": loss.cross_entropy.item()}
            if loss.distillation is not None:
                entry["distillation"] = loss.distillation.item()
            if not all(np.isfinite(value) for value in entry.values()):
                raise UsageError(
                    f"Training diverged: the loss of shape {shape} is {entry['loss']}.",
                    next_step="Lower --learning-rate, or train in fp32.",
                )
            (loss.total * self.loss_scale).backward()  # type: ignore[no-untyped-call]
            losses.append((shape, entry))
        return losses


@dataclass(frozen=True, slots=True)
class GateNoise:
    """Draws for the gate: a function of seed, step, micro-batch and subnet.

    Attributes:
        key: Seed, step and micro-batch.
        experts: Numbers per draw.
        scale: Falls from 1 to 0 over the warm-up.
    """

    key: tuple[int, int, int]
    experts: int
    scale: float

    def draw(self, subnet: int) -> torch.Tensor:
        """Scaled N(0, 1), float32 [E]."""
        normal_E = np.random.default_rng([*self.key, subnet]).standard_normal(self.experts)
        return torch.from_numpy(normal_E * self.scale).to(torch.float32)


def noise_scale(step: int, max_steps: int, warmup: float) -> float:
    """1 at the first step, 0 once `warmup` of the steps are done, linear between."""
    end = warmup * max_steps
    return max(0.0, 1.0 - step / end) if end > 0 else 0.0


def rate_schedule(settings: Settings, optimizer: torch.optim.Optimizer) -> Callable[[int], float]:
    """The share of the learning rate by step: a function of it, so that there is no state of it to save.

    One step more than there are, read one step late: neither the first nor the last step is spent at a rate of zero.
    """
    share: Callable[[int], float] = get_scheduler(
        settings.schedule,
        optimizer,
        num_warmup_steps=round(settings.warmup * settings.max_steps),
        num_training_steps=settings.max_steps + 1,
    ).lr_lambdas[0]
    return share
