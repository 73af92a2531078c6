"""One decoder layer, whole or cut, made from what the family says: the layer of calibration, refit and healing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional

from amoeba_export.ir import Architecture, Part, Role
from amoeba_export.ir.family import READERS
from amoeba_export.model.experts import Heard, mixed, route
from amoeba_export.model.function import ACTIVATIONS, Place, attention, rms_norm

Weights = Mapping[tuple[Role, Part], torch.Tensor]


class Linear(nn.Module):
    """A matrix [O, I] with its bias, either of them given. A writer of a block that is gone has no inputs: I is 0."""

    def __init__(self, weight_OI: torch.Tensor, bias_O: torch.Tensor | None) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight_OI, requires_grad=False)
        self.bias = None if bias_O is None else nn.Parameter(bias_O, requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., I] -> [..., O]."""
        return functional.linear(x, self.weight, self.bias)


class Norm(nn.Module):
    """A root-mean-square norm of the family's form."""

    def __init__(self, weight: torch.Tensor, architecture: Architecture) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.eps, self.offset = architecture.norm_eps, architecture.norm_offset

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Over the last axis."""
        return rms_norm(x, self.weight, self.eps, self.offset)


@dataclass(frozen=True, slots=True, eq=False)
class Exit:
    """What becomes of what a writer gives: a norm, or none, and a scale."""

    norm: Norm | None
    scale: float

    @property
    def changes_nothing(self) -> bool:
        """Whether it is added as it is."""
        return self.norm is None and self.scale == 1.0

    def added(self, written_BTD: torch.Tensor) -> torch.Tensor:
        """What is added to the stream. [B, T, D]."""
        added_BTD: torch.Tensor = written_BTD if self.norm is None else self.norm(written_BTD)
        return added_BTD if self.scale == 1.0 else added_BTD * self.scale

    def aim(self, wanted_TD: torch.Tensor, written_TD: torch.Tensor) -> torch.Tensor:
        """What a writer should give so that `added` comes near to `wanted_TD`. [T, D].

        Behind a norm, that is what it gives now, and one Gauss-Newton step towards what is wanted, with the size that
        the norm divides by as it is. Channels that the norm nearly mutes stay as they are.
        """
        if self.norm is None:
            return wanted_TD / self.scale
        gain_D = self.norm.offset + self.norm.weight
        size_T1 = written_TD.square().mean(dim=1, keepdim=True).sqrt()
        missing_TD = (wanted_TD - self.added(written_TD)) / self.scale
        return written_TD + size_T1 * missing_TD * (gain_D / (gain_D.square() + (gain_D.abs().mean() / 4) ** 2))


class DecoderLayer(nn.Module):
    """One layer. Its modules are called by their roles; those that a family or a cut does not have are not there.

    A block without heads, or without neurons, adds what its writer's bias makes, or nothing.

    Args:
        architecture: Of the supernet.
        kind: Index into `layer_kinds`: how it attends.
        weights: By role and part, sliced.

    Attributes:
        heard: Is told what every expert gives, while somebody listens.
    """

    def __init__(self, architecture: Architecture, kind: int, weights: Weights) -> None:
        super().__init__()
        self.architecture, self.kind = architecture, kind
        self.heard: Heard | None = None
        for role, part in weights:
            if part == "weight":
                weight = weights[role, part]
                is_norm = role.endswith("norm")
                module = Norm(weight, architecture) if is_norm else Linear(weight, weights.get((role, "bias")))
                self.add_module(role, module)

    def role(self, role: Role) -> nn.Module | None:
        """The module of a role, or None."""
        return getattr(self, role, None)

    def forward(self, hidden_BTD: torch.Tensor, place: Place) -> torch.Tensor:
        """The residual stream after the layer. [B, T, D]."""
        return self.block("down", self.block("o", hidden_BTD, place), place)

    def block(self, writer: Role, hidden_BTD: torch.Tensor, place: Place) -> torch.Tensor:
        """The residual stream after the block of a writer. [B, T, D]."""
        if self.is_routed(writer):
            return hidden_BTD + self.leave(writer, self._experts(hidden_BTD))
        return hidden_BTD + self.leave(writer, self.writer(writer)(self.enter(writer, hidden_BTD, place)))

    def is_routed(self, writer: Role) -> bool:
        """Whether the block of a writer is experts, so that each token enters some of its columns."""
        return writer == "down" and self.role("router") is not None and self.writer(writer).weight.shape[1] > 0

    def reads_norm(self, role: Role) -> bool:
        """Whether what enters a matrix has just left a norm, so that the size of the stream does not show in it."""
        return any(role in readers and self.role(norm) is not None for norm, readers in READERS.items())

    def writer(self, writer: Role) -> Linear:
        """`o` or `down`."""
        module = self.role(writer)
        assert isinstance(module, Linear)
        return module

    def enter(self, writer: Role, hidden_BTD: torch.Tensor, place: Place) -> torch.Tensor:
        """What enters a writer when `hidden_BTD` enters its block. [B, T, C]."""
        if not self.writer(writer).weight.shape[1]:
            return hidden_BTD.new_zeros(*hidden_BTD.shape[:2], 0)
        if writer == "o":
            x_BTD = self._through("attn_in_norm", hidden_BTD)
            q, k, v = (self._through(role, x_BTD) for role in ("q", "k", "v"))
            return attention(q, k, v, self.architecture, place, q_norm=self.role("q_norm"), k_norm=self.role("k_norm"))
        x_BTD = self._through("ffn_in_norm", hidden_BTD)
        act = ACTIVATIONS[self.architecture.activation]
        return act(self._through("gate", x_BTD)) * self._through("up", x_BTD)

    def _experts(self, hidden_BTD: torch.Tensor) -> torch.Tensor:
        """What the experts of each token write. [B, T, D]."""
        x_BTD = self._through("ffn_in_norm", hidden_BTD)
        share_BTK, picked_BTK = route(self._through("router", x_BTD), self.architecture)
        act, size = ACTIVATIONS[self.architecture.activation], self.architecture.unit_size
        gate, up, down = (self.get_parameter(f"{role}.weight") for role in ("gate", "up", "down"))

        def expert(index: int, x_TD: torch.Tensor) -> torch.Tensor:
            own = slice(index * size, (index + 1) * size)
            inner_TF = act(functional.linear(x_TD, gate[own])) * functional.linear(x_TD, up[own])
            return functional.linear(inner_TF, down[:, own])

        return mixed(x_BTD, share_BTK, picked_BTK, expert, heard=self.heard)

    def leave(self, writer: Role, written_BTD: torch.Tensor) -> torch.Tensor:
        """What is added to the stream when a writer gives `written_BTD`."""
        return self.exit(writer).added(written_BTD)

    def exit(self, writer: Role) -> Exit:
        """What lies between a writer and the stream."""
        norm = self.role("attn_out_norm" if writer == "o" else "ffn_out_norm")
        return Exit(norm if isinstance(norm, Norm) else None, self.architecture.residual_scale)

    def _through(self, role: Role, x: torch.Tensor) -> torch.Tensor:
        module = self.role(role)
        if module is None:
            return x
        y: torch.Tensor = module(x)
        return y
