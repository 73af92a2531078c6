"""SMoL: a mixture of LoRAs whose gate sees the shape (paper sec. 3.3; upstream `peft/tuners/lora/{moe,bnb,model}.py`).

One gate for the whole model: [active layers ; one-hot of the width choice] -> linear -> linear -> softmax over the top
k logits. An adapted linear computes W x + scale * (sum_e g_e B_e)(sum_e g_e A_e) x: the gate enters twice. Upstream
adds noise to the logits, when evaluating too; here there is none, so the gate is a constant of the plan.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch

from amoeba_export.errors import DamagedFile, InputError, WrongModel
from amoeba_export.ir import AdapterDelta, InputId, SubnetPlan, TensorSource
from amoeba_export.load.adapter_folder import AdapterFile
from amoeba_export.load.adapter_names import Parts
from amoeba_export.load.lora import scaling
from amoeba_export.reading.bounds import MAX_EXPERTS, shown

ROUTER = "base_model.lora_sparsemoe.router."
_GATE = tuple(f"{ROUTER}topkroute_linear.{i}.{kind}" for i in (0, 1) for kind in ("weight", "bias"))
LONGEST_CHOICES = 4096
_NOISE = tuple(f"{ROUTER}noise_linear.{kind}" for kind in ("weight", "bias"))
GATE_WEIGHTS = (*_GATE, *_NOISE)
"""Weights of the file that belong to no module."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Routing:
    """What the gate says to one shape.

    Attributes:
        scores_E: Softmax over the top k, zero elsewhere. fp32 [E].
        indices: The top k experts, the strongest first.
    """

    scores_E: torch.Tensor
    indices: tuple[int, ...]


class SmolAdapter:
    """One gate and E pairs (A, B) per module; the mixture for a plan is one pair."""

    def __init__(
        self,
        weights: TensorSource,
        modules: Mapping[str, tuple[tuple[str, str], ...]],
        *,
        width_choices: tuple[float, ...],
        top_k: int,
        scale: float,
        num_layers: int,
        identity: InputId,
    ) -> None:
        self._weights = weights
        self._modules = dict(modules)
        self._gates: dict[tuple[tuple[int, ...], float], Routing] = {}
        self.width_choices = width_choices
        self.top_k = top_k
        self.scale = scale
        self.num_layers = num_layers
        self.input = identity

    @classmethod
    def open(
        cls, file: AdapterFile, found: Mapping[str, Parts], matrices: Mapping[str, tuple[int, int]], num_layers: int
    ) -> SmolAdapter:
        """Find the gate, and check the shapes of every expert in `found`. `matrices`: module -> (out, in)."""
        config, weights, where = file.config, file.weights, file.path
        choices = parse_width_choice(config.get("width_choice"), where=where)
        num_experts, top_k, rank = (file.count(key, config.get(key)) for key in ("num_experts", "top_k", "r"))
        if num_experts > MAX_EXPERTS:
            raise DamagedFile(where, f"its config has {num_experts} experts; {MAX_EXPERTS} are possible")
        if top_k > num_experts:
            raise DamagedFile(where, f"its config takes the top {top_k} of {num_experts} experts")
        if missing := [name for name in _GATE if name not in weights.names()]:
            raise DamagedFile(where, f"the gate is not complete: {missing[0]} is missing")
        gate_in = weights.shape(_GATE[0])[-1]
        differences = []
        if gate_in != num_layers + len(choices):
            differences.append(
                f"its gate knows {gate_in - len(choices)} layers and {len(choices)} widths, this model has "
                f"{num_layers} layers"
            )
        differences += file.differences(_GATE[2], (num_experts, weights.shape(_GATE[0])[0]))
        modules = {}
        for module, parts in found.items():
            if set(parts) != {(part, expert) for part in ("lora_A", "lora_B") for expert in range(num_experts)}:
                raise DamagedFile(where, f"{module} does not have an A and a B for each of {num_experts} experts")
            pairs = tuple((parts["lora_A", expert], parts["lora_B", expert]) for expert in range(num_experts))
            out, inner = matrices[module]
            for a, b in pairs:
                differences += file.differences(a, (rank, inner))
                differences += file.differences(b, (out, rank))
            modules[module] = pairs
        if differences:
            raise WrongModel("The adapter", differences[:4], where=where)
        return cls(
            weights,
            modules,
            width_choices=choices,
            top_k=top_k,
            scale=scaling(file.alpha(config.get("lora_alpha", 8)), rank, use_rslora=bool(config.get("use_rslora"))),
            num_layers=num_layers,
            identity=file.input,
        )

    def modules(self) -> Collection[str]:
        """Supernet module names it changes."""
        return self._modules.keys()

    def gate(self, active_layers: Sequence[int], width: float) -> Routing:
        """The gate's answer to one shape, without noise.

        Args:
            active_layers: 0/1 per layer of the supernet. [L].
            width: One of `width_choices`.

        Raises:
            InputError: The gate does not know this width.
        """
        key = (tuple(active_layers), width)
        if key not in self._gates:
            self._gates[key] = self._ask(*key)
        return self._gates[key]

    def gate_for(self, plan: SubnetPlan) -> Routing:
        """The gate's answer to a plan: at its `gate_width`, or at its shape's width where it names none."""
        width = plan.shape.width if plan.gate_width is None else plan.gate_width
        return self.gate(plan.active_layers(self.num_layers), width)

    def delta(self, module: str, plan: SubnetPlan) -> AdapterDelta | None:
        """The mixture that `plan` gets on `module`, or None when there is none."""
        if module not in self._modules:
            return None
        gate = self.gate_for(plan)
        chosen = [(float(gate.scores_E[expert]), self._modules[module][expert]) for expert in gate.indices]
        a_RI = sum((score * self._read(a) for score, (a, _) in chosen), start=torch.zeros(()))
        b_OR = sum((score * self._read(b) for score, (_, b) in chosen), start=torch.zeros(()))
        return AdapterDelta(a_RI=a_RI, b_OR=b_OR, scale=self.scale)

    def _ask(self, active_layers: tuple[int, ...], width: float) -> Routing:
        known = [idx for idx, choice in enumerate(self.width_choices) if abs(choice - width) < 1e-6]
        if not known:
            raise InputError(
                f"The adapter's gate does not know width {width:g}.",
                where=self.input.id,
                next_step=f"Choose one of: {', '.join(f'{choice:g}' for choice in self.width_choices)}.",
            )
        one_hot = [float(idx == known[0]) for idx in range(len(self.width_choices))]
        # fp64, rounded at the end: an fp32 product depends on how its operands happen to lie in memory.
        shape = torch.tensor([*map(float, active_layers), *one_hot], dtype=torch.float64)
        w0, bias0, w1, bias1 = (self._weights.read(name).to(torch.float64) for name in _GATE)
        logits_E = w1 @ (w0 @ shape + bias0) + bias1
        top = logits_E.topk(self.top_k)
        scores_E = torch.zeros_like(logits_E).scatter(0, top.indices, torch.softmax(top.values, dim=0))
        return Routing(scores_E=scores_E.to(torch.float32), indices=tuple(map(int, top.indices)))

    def _read(self, name: str) -> torch.Tensor:
        return self._weights.read(name).to(torch.float32)


def _fraction(text: str) -> Fraction:
    if "e" in text.lower() or len(text) > 40:  # Fraction("1e999999999") computes for ever
        raise ValueError(shown(text))
    return Fraction(text)


def parse_width_choice(value: Any, *, where: Path) -> tuple[float, ...]:
    """`"[1,7/8,0.65]"`, as upstream's command line spells it, or a list of numbers. Parsed, never evaluated.

    Raises:
        DamagedFile: It is neither.
    """
    if isinstance(value, str) and len(value) > LONGEST_CHOICES:
        raise DamagedFile(where, f"its width_choice is {len(value)} letters long")
    items = value.strip().removeprefix("[").removesuffix("]").split(",") if isinstance(value, str) else value
    try:
        choices = tuple(float(_fraction(str(item).strip())) for item in items)
    except (TypeError, ValueError, ArithmeticError) as error:
        raise DamagedFile(where, f"its width_choice is not a list of fractions: {shown(value)}") from error
    if not choices or len(set(choices)) != len(choices) or not all(0 < choice <= 1 for choice in choices):
        raise DamagedFile(where, f"its width_choice is not a list of different widths up to 1: {shown(value)}")
    return choices
