"""SMoL: a mixture of LoRAs whose gate sees the shape, not the tokens (paper sec. 3.3; upstream `peft/tuners/lora`).

E experts, K chosen experts, R rank, O out features, I in features, G gate inputs (layers + width choices).

For a shape the gate is a constant, so the mixture is one low-rank pair, in which the gate enters twice:
W x + (alpha / r) (sum g_e B_e) (sum g_e A_e) x.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import cast

import torch
from torch import nn
from torch.nn import functional

from amoeba_export.errors import UnsupportedError
from amoeba_export.finetune.settings import TARGETS, LowRankSettings
from amoeba_export.ir import Adapter, Architecture, Family, Role, SubnetPlan
from amoeba_export.ir.family import LINEARS

Pair = tuple[torch.Tensor, torch.Tensor]
"""A_RI and B_OR of one linear weight, the scale already in B: the change of W is B @ A."""

LowRank = Callable[[str], Pair | None]
"""What a shape changes: module name (`model.layers.0.self_attn.q_proj`) -> its pair, or None where nothing changes."""

GATE_HIDDEN = 16


def linear_shapes(family: Family, architecture: Architecture, targets: Iterable[str]) -> dict[str, tuple[int, int]]:
    """Module name -> (out features, in features) of every adapted weight of the uncut model, layer by layer."""
    chosen = [role for target, role in zip(TARGETS, LINEARS, strict=True) if target in set(targets)]
    shapes: dict[Role, tuple[int, int]] = {}
    for template in family.layer:
        if len(template.axes) == 2:
            rows, columns = (architecture.axis_size(axis) for axis in template.axes)
            shapes[template.role] = (rows, columns)
    return {family.module(role, layer): shapes[role] for layer in range(architecture.num_layers) for role in chosen}


class Gate(nn.Module):
    """Scores of the experts for a shape: two linear layers without activation, softmax over the top-k logits.

    Args:
        num_layers: Layers of the supernet.
        widths: The width choices, in the order of their one-hot.
    """

    def __init__(self, num_layers: int, widths: Sequence[float], experts: int, top_k: int) -> None:
        super().__init__()
        self.num_layers = num_layers
        self.widths = tuple(widths)
        self.top_k = top_k
        inputs = num_layers + len(self.widths)
        self.topkroute_linear = nn.Sequential(nn.Linear(inputs, GATE_HIDDEN), nn.Linear(GATE_HIDDEN, experts))
        self.noise_linear = nn.Linear(inputs, experts)

    def forward(self, plan: SubnetPlan, noise_E: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Scores [K], in falling order, and the experts [K] that they belong to.

        Args:
            plan: Its kept layers and its `gate_width` are the gate's input.
            noise_E: A draw of N(0, 1), scaled here by softplus of a third linear layer; None for no noise.
        """
        assert plan.gate_width in self.widths, f"the plan asks for width choice {plan.gate_width}, not in {self.widths}"
        one_hot = [float(width == plan.gate_width) for width in self.widths]
        inputs_G = torch.tensor([*map(float, plan.active_layers(self.num_layers)), *one_hot])
        inputs_G = inputs_G.to(self.noise_linear.weight.device)
        logits_E = self.topkroute_linear(inputs_G)
        if noise_E is not None:
            logits_E = logits_E + noise_E.to(logits_E.device) * functional.softplus(self.noise_linear(inputs_G))
        top_K, experts_K = logits_E.topk(self.top_k)
        return functional.softmax(top_K, dim=-1), experts_K


class TrainedLowRank(nn.Module):
    """The trained weights: E pairs per adapted linear weight, and the gate where there is one.

    A starts as a linear layer's default, B at zero, so that training starts from the pretrained function.

    Args:
        family: Names the weights.
        architecture: Of the supernet.
        settings: `lora` mode has one expert and no gate.
        widths: The gate's width choices.
        generator: Makes the start repeatable whatever else has drawn numbers.
    """

    def __init__(
        self,
        family: Family,
        architecture: Architecture,
        settings: LowRankSettings,
        widths: Sequence[float],
        *,
        generator: torch.Generator,
    ) -> None:
        super().__init__()
        self.settings = settings
        self.shapes = linear_shapes(family, architecture, settings.targets)
        experts = settings.experts if settings.mode == "smol" else 1
        self.gate = Gate(architecture.num_layers, widths, experts, settings.top_k) if settings.mode == "smol" else None
        for layer in self.gate.modules() if self.gate else ():
            if isinstance(layer, nn.Linear):
                bound = 1 / math.sqrt(layer.in_features)
                nn.init.uniform_(layer.weight, -bound, bound, generator=generator)
                nn.init.uniform_(layer.bias, -bound, bound, generator=generator)
        a, b = {}, {}
        for module, (out_features, in_features) in self.shapes.items():
            a_ERI = torch.empty(experts, settings.rank, in_features)
            bound = 1 / math.sqrt(in_features)  # Kaiming's with a = sqrt(5), as peft has it
            nn.init.uniform_(a_ERI, -bound, bound, generator=generator)
            a[_key(module)] = nn.Parameter(a_ERI)
            b[_key(module)] = nn.Parameter(torch.zeros(experts, out_features, settings.rank))
        self.a = nn.ParameterDict(a)
        self.b = nn.ParameterDict(b)

    def at(self, plan: SubnetPlan, *, noise_E: torch.Tensor | None = None) -> LowRank:
        """The change of every weight for `plan`. Gradients reach the chosen experts and the gate."""
        scale = self.settings.alpha / self.settings.rank
        if self.gate is None:
            return lambda module: (
                (self.a_of(module)[0], self.b_of(module)[0] * scale) if module in self.shapes else None
            )
        scores_K, experts_K = self.gate(plan, noise_E)
        scores_E = scores_K.new_zeros(self.settings.experts).index_put((experts_K,), scores_K)
        scaled_E = scores_E * scale

        def mixed(module: str) -> Pair | None:
            if module not in self.shapes:
                return None
            return _mixture(scores_E, self.a_of(module)), _mixture(scaled_E, self.b_of(module))

        return mixed

    def a_of(self, module: str) -> nn.Parameter:
        """A_ERI of one module: every expert, stacked."""
        return cast(nn.Parameter, self.a[_key(module)])

    def b_of(self, module: str) -> nn.Parameter:
        """B_EOR of one module: every expert, stacked."""
        return cast(nn.Parameter, self.b[_key(module)])


def _mixture(scores_E: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Sum of stacked weights [E, ...], one score each."""
    return (scores_E @ weights.flatten(1)).view(weights.shape[1:])


def adapters_at(adapters: Sequence[Adapter], plan: SubnetPlan, *, device: torch.device | str = "cpu") -> LowRank:
    """The summed change of finished adapters for `plan`. Their ranks are laid side by side.

    Raises:
        UnsupportedError: A DoRA adapter, whose change is not low-rank.
    """

    def summed(module: str) -> Pair | None:
        deltas = [delta for adapter in adapters if (delta := adapter.delta(module, plan)) is not None]
        if not deltas:
            return None
        if any(delta.magnitude_O is not None for delta in deltas):
            raise UnsupportedError(
                f"A DoRA adapter cannot run on the masked supernet: it rescales the rows of {module}.",
                next_step="Export the shape with this adapter, and give the artifact's folder instead.",
            )
        a_RI = torch.cat([delta.a_RI.to(torch.float32) for delta in deltas])
        b_OR = torch.cat([delta.b_OR.to(torch.float32) * delta.scale for delta in deltas], dim=1)
        return a_RI.to(device), b_OR.to(device)

    return summed


def unchanged(module: str) -> Pair | None:
    """The pretrained weights, as they are."""
    return None


def _key(module: str) -> str:
    return module.replace(".", "/")  # torch refuses dots in the names of parameters
