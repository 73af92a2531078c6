"""Linears of the reference: the supernet's weights at full size, adapters beside them, inputs masked."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import nn

from amoeba_export.errors import InputError
from amoeba_export.ir import AdapterDelta, LayerPlan, Refit, Role, SubnetPlan, Supernet

_ADDED = 1e-5
"""How far two orders of adding thousands of products in fp32 may be apart, as a share of the sum of their sizes."""

_ROWS: dict[Role, str] = {"q": "query_heads", "k": "kv_heads", "v": "kv_heads", "gate": "ffn", "up": "ffn"}

_COLUMNS: dict[Role, str] = {"o": "query_heads", "down": "ffn"}
"""What of a `LayerPlan` the rows and columns of a projection are."""


def weight_of(supernet: Supernet, refit: Refit | None, name: str, cut_name: str) -> torch.Tensor:
    """A weight that no plan cuts: the refit's where it holds it, else the supernet's."""
    if refit is not None and cut_name in refit.tensors.names():
        return refit.tensors.read(cut_name)
    return supernet.tensors.read(name)


class Fitted(nn.Module):
    """A linear whose weights a refit holds: they stand where they were cut from, and zeros everywhere else."""

    def __init__(self, supernet: Supernet, refit: Refit, role: Role, kept: LayerPlan, cut_module: str) -> None:
        super().__init__()
        held, names = refit.tensors, refit.tensors.names()
        num_out, num_in = supernet.tensors.shape(supernet.family.weight(role, kept.source_layer))
        rows_O, columns_I = torch.ones(num_out, dtype=torch.bool), torch.ones(num_in, dtype=torch.bool)
        for keep, roles in ((rows_O, _ROWS), (columns_I, _COLUMNS)):
            if role in roles:
                units = getattr(kept, roles[role])
                size = 1 if roles[role] == "ffn" else supernet.architecture.head_dim
                keep.zero_().view(-1, size)[list(units)] = True
        self._w_OI = torch.zeros(num_out, num_in)
        if f"{cut_module}.weight" in names:
            self._w_OI[rows_O.nonzero(), columns_I.nonzero().T] = held.read(f"{cut_module}.weight").float()
        self._bias_O: torch.Tensor | None = None
        if f"{cut_module}.bias" in names:
            self._bias_O = torch.zeros(num_out)
            self._bias_O[rows_O] = held.read(f"{cut_module}.bias").float()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The product with the full-size weight, plus the bias."""
        return nn.functional.linear(x, self._w_OI, self._bias_O)


class Experts(nn.Module):
    """The experts of a layer at full size. What picks them counts those that are kept."""

    def __init__(self, supernet: Supernet, kept: LayerPlan, activation: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.act_fn, self._kept = activation, kept.ffn
        roles: tuple[Role, ...] = ("gate", "up", "down")
        tensors, num_experts = supernet.tensors, supernet.architecture.ffn_size
        gate, up, down = (tensors.read(supernet.family.weight(role, kept.source_layer)).float() for role in roles)
        self._gates, self._ups, self._downs = gate.chunk(num_experts), up.chunk(num_experts), down.chunk(num_experts, 1)

    def forward(self, x_TD: torch.Tensor, picked_TK: torch.Tensor, share_TK: torch.Tensor) -> torch.Tensor:
        """The sum of what they give, by the shares that a router gave. [T, D]."""
        y_TD = torch.zeros_like(x_TD)
        for position, expert in enumerate(self._kept):
            share_T1 = (share_TK * (picked_TK == position)).sum(dim=1, keepdim=True)
            inner_TF = self.act_fn(x_TD @ self._gates[expert].T) * (x_TD @ self._ups[expert].T)
            y_TD += share_T1 * (inner_TF @ self._downs[expert].T)
        return y_TD


class Together(nn.Module):
    """Several linears as the one that transformers has in their place."""

    def __init__(self, parts: Sequence[nn.Module]) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """What each of them makes, side by side."""
        return torch.cat([part(x) for part in self.parts], dim=-1)


class Unmerged(nn.Module):
    """A linear of the supernet, full size, with adapters beside it and, on request, inputs masked."""

    def __init__(self, supernet: Supernet, plan: SubnetPlan, role: Role, layer: int | None = None) -> None:
        super().__init__()
        tensors, family = supernet.tensors, supernet.family
        self._supernet, self._plan, self._role = supernet, plan, role
        module = family.module(role, layer)
        tied = role == "head" and supernet.architecture.tied_embeddings
        self._w_OI = tensors.read(family.weight("embedding") if tied else f"{module}.weight").float()
        self._bias_O: torch.Tensor | None = None
        if f"{module}.bias" in tensors.names():
            self._bias_O = tensors.read(f"{module}.bias").float()
        self._deltas = [
            delta
            for adapter in supernet.adapters
            if module in adapter.modules() and (delta := adapter.delta(module, plan)) is not None
        ]
        self._keep_I: torch.Tensor | None = None
        self._constant_O: torch.Tensor | None = None
        self._mean_I: torch.Tensor | None = None

    @property
    def is_adapted(self) -> bool:
        """Whether an adapter changes it."""
        return bool(self._deltas)

    def merged(self) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | float]:
        """The same function as one full-size weight and bias, and what another order of adding may do to the bias."""
        w_OI = self._w_OI
        for delta in self._deltas:
            w_OI, _ = _rescaled(w_OI, delta)
        parts = [part for part in (self._bias_O, self._constant_O) if part is not None]
        slack_O: torch.Tensor | float = 0.0
        if self._mean_I is not None:
            slack_O = _ADDED * nn.functional.linear(self._mean_I.abs(), self._w_OI.abs())
        return w_OI, torch.stack(parts).sum(0) if parts else None, slack_O

    def mask(self, kept: LayerPlan) -> None:
        """Zero the inputs of dropped heads or neurons, and add what they contributed on average."""
        architecture, plan = self._supernet.architecture, self._plan
        keep = torch.zeros(self._w_OI.shape[1])
        if self._role == "o":
            keep.view(architecture.num_heads, -1)[list(kept.query_heads)] = 1
            wanted = plan.has_o_bias(kept, architecture)
        else:
            keep.view(architecture.ffn_size, -1)[list(kept.ffn)] = 1
            wanted = plan.has_down_bias(kept, architecture)
        self._keep_I = keep
        if wanted:
            self._constant_O = self._average(kept, 1 - keep)

    def _average(self, kept: LayerPlan, dropped_I: torch.Tensor) -> torch.Tensor:
        strategy, attention = self._supernet.strategy, self._role == "o"
        if strategy is None:
            raise InputError("The plan has compensation biases and no strategy is given.", next_step="Give --strategy.")
        if self._plan.width_key is not None:
            width = strategy.widths[self._plan.width_key]
            return torch.tensor((width.o_bias_LD if attention else width.down_bias_LD)[kept.source_layer]).float()
        assert strategy.importance is not None, "an upstream import names its width in the plan"
        means = strategy.importance.o_mean_LQ if attention else strategy.importance.down_mean_LF
        self._mean_I = torch.tensor(means[kept.source_layer]).float() * dropped_I
        return nn.functional.linear(self._mean_I, self._w_OI)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., I] -> [..., O]."""
        if self._keep_I is not None:
            x = x * self._keep_I
        y = nn.functional.linear(x, self._w_OI)
        w_OI = self._w_OI
        for delta in self._deltas:
            a_RI, b_OR = delta.a_RI.float(), delta.b_OR.float()
            y = y + delta.scale * ((x @ a_RI.T) @ b_OR.T)
            if any(other.magnitude_O is not None for other in self._deltas):
                w_OI, ratio_O = _rescaled(w_OI, delta)
                y = y * ratio_O
        for constant_O in (self._bias_O, self._constant_O):
            if constant_O is not None:
                y = y + constant_O
        return y


def _rescaled(w_OI: torch.Tensor, delta: AdapterDelta) -> tuple[torch.Tensor, torch.Tensor | float]:
    """The weight that a later DoRA adapter finds, and the factor by which this one rescales each output."""
    changed_OI = w_OI + delta.scale * (delta.b_OR.float() @ delta.a_RI.float())
    if delta.magnitude_O is None:
        return changed_OI, 1.0
    ratio_O = delta.magnitude_O.float() / torch.linalg.vector_norm(changed_OI, dim=1)
    return changed_OI * ratio_O[:, None], ratio_O
