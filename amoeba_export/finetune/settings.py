"""What a fine-tuning run can be told, and every way in which that can be wrong."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from amoeba_export.errors import AmoebaError, BadValue, Problems, UnknownName
from amoeba_export.ir import Policy
from amoeba_export.ir.dtype import TRAINED_DTYPES
from amoeba_export.ir.family import LINEARS

Mode = Literal["smol", "lora"]
"""`smol`: a shape-aware mixture of LoRAs with one gate. `lora`: one plain LoRA, a standard PEFT adapter."""

MaskForm = Literal["shifted", "unshifted"]
"""Which positions are distilled. `shifted`: those that predict a label. `unshifted`: those that hold one, which is what
the published code does (`trainer.py`, `compute_loss`) and off by one."""

TARGETS = tuple(f"{role}_proj" for role in LINEARS)
MODES = ("smol", "lora")
POLICIES = ("uniform", "adaptive")
MASK_FORMS = ("shifted", "unshifted")
SCHEDULES = ("constant", "constant_with_warmup", "linear", "cosine")
PROMPTS = ("auto", "alpaca", "chat")


@dataclass(frozen=True, slots=True, kw_only=True)
class LowRankSettings:
    """The trained part: low-rank changes of linear weights (paper sec. 3.3).

    Attributes:
        rank: R, of each expert.
        alpha: The change is scaled by alpha / rank.
        experts: E, LoRAs per linear weight. `lora` mode has one and no gate.
        top_k: Experts that a shape mixes.
        targets: Which linear weights of a layer get experts.
        gate_warmup: Share of the steps in which the gate is noisy. The noise falls linearly to zero, so that a shape's
            weights are settled well before the end; the published code keeps it, even at evaluation.
    """

    mode: Mode = "smol"
    rank: int = 16
    alpha: float = 32.0
    experts: int = 5
    top_k: int = 2
    targets: tuple[str, ...] = TARGETS
    gate_warmup: float = 0.25


@dataclass(frozen=True, slots=True, kw_only=True)
class ObjectiveSettings:
    """What a step minimises (paper sec. 3.3; upstream `trainer.py`, `training_step`).

    Attributes:
        kd_weight: Weight of the distillation loss of every subnet but the first; the rest is cross-entropy on labels.
        temperature: Divides both logits before the softmax. The loss is not multiplied by its square.
        balance: Scale each loss to the magnitude of the first subnet's.
        mask: Which positions are distilled.
    """

    kd_weight: float = 1.0
    temperature: float = 1.0
    balance: bool = True
    mask: MaskForm = "shifted"


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """One run. Everything that the result depends on, next to model, strategy and data.

    Attributes:
        subnets: Shapes per micro-batch: the full one, random ones between, the smallest.
        depths: Depths to draw from; empty for all that the strategy knows.
        widths: Widths to draw from, which are also the gate's choices.
        policy: How a width is spread over layers.
        batch_size: Rows of one process's micro-batch.
        gradient_accumulation: Micro-batches per optimizer step.
        max_length: Tokens in a row; longer examples lose their end.
        packing: Put several examples in a row, each blind to the others.
        prompt: How instructions become text: the tokenizer's chat template, the Alpaca words, or `auto` for the chat
            template where there is one.
        warmup: Share of the steps in which the learning rate rises.
        max_grad_norm: Gradients are clipped to this norm; 0 for never.
        save_every: Steps between checkpoints, of which the last two are kept.
    """

    low_rank: LowRankSettings = field(default_factory=LowRankSettings)
    objective: ObjectiveSettings = field(default_factory=ObjectiveSettings)
    subnets: int = 4
    depths: tuple[int, ...] = ()
    widths: tuple[float, ...] = (1.0, 0.875, 0.75, 0.625)
    policy: Policy = "uniform"
    max_steps: int = 1000
    batch_size: int = 4
    gradient_accumulation: int = 1
    max_length: int = 512
    packing: bool = True
    prompt: str = "auto"
    learning_rate: float = 2e-4
    schedule: str = "cosine"
    warmup: float = 0.03
    weight_decay: float = 0.0
    max_grad_norm: float = 0.3
    dtype: str = TRAINED_DTYPES[0]
    gradient_checkpointing: bool = False
    save_every: int = 100
    seed: int = 0

    @property
    def gate_widths(self) -> tuple[float, ...]:
        """The gate's width choices: `widths`, largest first."""
        return tuple(sorted(set(self.widths), reverse=True))

    def check(self) -> None:
        """Raise what is wrong: the one mistake, or `Problems` with all of them."""
        problems = list(self._problems())
        if len(problems) == 1:
            raise problems[0]
        if problems:
            raise Problems(problems)

    def _problems(self) -> Iterator[AmoebaError]:
        low_rank, objective = self.low_rank, self.objective
        for kind, name, known in (
            ("mode", low_rank.mode, MODES),
            ("distillation mask", objective.mask, MASK_FORMS),
            ("policy", self.policy, POLICIES),
            ("prompt", self.prompt, PROMPTS),
            ("schedule", self.schedule, SCHEDULES),
            ("dtype", self.dtype, TRAINED_DTYPES),
        ):
            if name not in known:
                yield UnknownName(kind, name, known)
        for target in low_rank.targets:
            if target not in TARGETS:
                yield UnknownName("adapter target", target, TARGETS)
        if not low_rank.targets:
            yield BadValue("--targets", "", f"at least one of {', '.join(TARGETS)}")
        for option, count, least in (
            ("--rank", low_rank.rank, 1),
            ("--experts", low_rank.experts, 1),
            ("--top-k", low_rank.top_k, 1),
            ("--subnets", self.subnets, 1),
            ("--max-steps", self.max_steps, 1),
            ("--batch-size", self.batch_size, 1),
            ("--gradient-accumulation", self.gradient_accumulation, 1),
            ("--max-length", self.max_length, 2),
            ("--save-every", self.save_every, 1),
        ):
            if count < least:
                yield BadValue(option, str(count), f"a whole number of at least {least}")
        if low_rank.mode == "smol" and low_rank.top_k > low_rank.experts >= 1:
            yield BadValue("--top-k", str(low_rank.top_k), f"at most the number of experts, {low_rank.experts}")
        for option, share in (
            ("--kd-weight", objective.kd_weight),
            ("--gate-warmup", low_rank.gate_warmup),
            ("--warmup", self.warmup),
        ):
            if not 0 <= share <= 1:
                yield BadValue(option, f"{share:g}", "a number from 0 to 1")
        for option, value in (
            ("--learning-rate", self.learning_rate),
            ("--alpha", low_rank.alpha),
            ("--temperature", objective.temperature),
        ):
            if not (value > 0 and math.isfinite(value)):
                yield BadValue(option, f"{value:g}", "a number above 0")
        for option, value in (("--weight-decay", self.weight_decay), ("--max-grad-norm", self.max_grad_norm)):
            if not (value >= 0 and math.isfinite(value)):
                yield BadValue(option, f"{value:g}", "a number of at least 0")
        if not self.widths or any(not 0 < width <= 1 for width in self.widths):
            yield BadValue("--widths", ",".join(f"{w:g}" for w in self.widths), "widths above 0 and at most 1")

    def to_json(self) -> dict[str, Any]:
        """Plain values, as they are written beside the adapter."""
        return asdict(self)
