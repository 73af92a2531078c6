"""The model that subnets are cut from: dims, a lazy source of weights, adapters, and where each came from."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from functools import reduce
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from amoeba_export.errors import InputError
from amoeba_export.ir.architecture import Architecture
from amoeba_export.ir.dtype import written_as
from amoeba_export.ir.family import Family
from amoeba_export.ir.plan import SubnetPlan
from amoeba_export.ir.refit import Refit

if TYPE_CHECKING:
    import torch

    from amoeba_export.ir.strategy import Strategy


class TensorSource(Protocol):
    """Named weights that are not read until asked for."""

    def names(self) -> Collection[str]:
        """Every weight there is."""

    def shape(self, name: str) -> tuple[int, ...]:
        """From the header alone."""

    def dtype(self, name: str) -> torch.dtype:
        """From the header alone."""

    def read(self, name: str) -> torch.Tensor:
        """The whole weight. May be a read-only memory map: never write into it. Raises `DamagedFile`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterDelta:
    """What one adapter does to one linear weight W [O, I]: W' = W + scale * b_OR @ a_RI, computed in fp32.

    Attributes:
        magnitude_O: DoRA only: rows of W' are rescaled to this norm, W'' = magnitude * W' / ||W'||_row.
    """

    a_RI: torch.Tensor
    b_OR: torch.Tensor
    scale: float
    magnitude_O: torch.Tensor | None = None


class Adapter(Protocol):
    """A fine-tuned change of linear weights: plain LoRA, rsLoRA, DoRA, or a shape-aware mixture (SMoL)."""

    @property
    def input(self) -> InputId:
        """Where it came from."""

    @property
    def width_choices(self) -> tuple[float, ...]:
        """Widths that the gate knows; empty when there is no gate."""

    def modules(self) -> Collection[str]:
        """Supernet module names it changes, such as `model.layers.0.self_attn.q_proj`."""

    def delta(self, module: str, plan: SubnetPlan) -> AdapterDelta | None:
        """The change of `module` for `plan` (the gate is a constant of the plan), or None when there is none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class InputId:
    """One input of an artifact, by content: `role` is `model`, `adapter`, `strategy`, `refit`, `rounding` and so on.

    Attributes:
        role: What it is: `model`, `strategy`, `adapter`, ...
        id: Its name.
        sha256: Its digest.
    """

    role: str
    id: str
    sha256: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Supernet:
    """The uncut model. Nothing is in memory until `tensors.read`.

    Attributes:
        name: What the user called it: a directory's name, a hub id, or `demo`.
        folder: The folder with `config.json`, tokenizer files and weights.
        identity: sha256 over the config and the weights files; strategies and plans refer to it.
        adapters: Applied in order.
        strategy: What to keep at each shape, or None before calibration.
        bare: The model before adapters that replace weights of it, or None when none does.
        tokenizer_folder: Of the tokenizer and chat template where an adapter brings another one, else None.
        refits: Fitted weights of cuts, by their identity.
        head_tokens: Tokens that logits of its cuts are computed of; None for all. See `with_head_tokens`.
    """

    name: str
    folder: Path
    architecture: Architecture
    family: Family
    tensors: TensorSource
    identity: str
    inputs: tuple[InputId, ...] = ()
    adapters: tuple[Adapter, ...] = ()
    strategy: Strategy | None = None
    bare: Supernet | None = None
    tokenizer_folder: Path | None = None
    refits: Mapping[str, Refit] = field(default_factory=dict)
    head_tokens: tuple[int, ...] | None = None

    def with_head_tokens(self, tokens: tuple[int, ...] | None) -> Supernet:
        """A copy whose cuts, the uncut one among them, compute logits of these tokens; None for all."""
        architecture = self.architecture.with_head(len(tokens) if tokens else None)
        return dataclasses.replace(self, architecture=architecture, head_tokens=tokens)

    @property
    def text_folder(self) -> Path:
        """Where the tokenizer and the chat template are: an adapter may bring others than the model's."""
        return self.tokenizer_folder or self.folder

    def without_adapters(self) -> Supernet:
        """The model that `identity` names, and the strategy."""
        return dataclasses.replace(self.bare or self, adapters=(), strategy=self.strategy)

    @property
    def gate_widths(self) -> tuple[float, ...]:
        """The width choices of the adapter with a gate, or none."""
        return next((adapter.width_choices for adapter in self.adapters if adapter.width_choices), ())

    @property
    def dtype(self) -> torch.dtype:
        """What a file that keeps the weights' own types says of them all: the widest type of its matrices.

        Readers convert all weights to it, so a narrower one would lose what the file has. Vectors do not count: norms
        are often kept in fp32 by models that are run in bf16.
        """
        import torch

        kinds = {self.tensors.dtype(name) for name in self.tensors.names() if len(self.tensors.shape(name)) > 1}
        return reduce(torch.promote_types, map(written_as, kinds))

    def full_plan(self) -> SubnetPlan:
        """The plan that keeps everything of this model."""
        plan = SubnetPlan.full(self.architecture, gate_widths=self.gate_widths, model_id=self.identity)
        return dataclasses.replace(plan, head_tokens=self.head_tokens)

    def refit_of(self, plan: SubnetPlan) -> Refit | None:
        """The weights that `plan` names, or None when it names none. Raises `InputError` where they are not at hand."""
        if plan.refit_id is None:
            return None
        if plan.refit_id not in self.refits:
            raise InputError(
                f"The plan names the refit {plan.refit_id:.12}, which is not at hand.",
                next_step="Give the file with --refit FILE, or --refit off for the weights as they were cut.",
            )
        return self.refits[plan.refit_id]
