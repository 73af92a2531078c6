"""Shapes and plans: what a user asks for, and exactly which weights that means."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from amoeba_export.errors import BadValue, InputError
from amoeba_export.ir.architecture import Architecture
from amoeba_export.ir.dense import Compensation, DenseArchitecture, has_compensation
from amoeba_export.reading import WrongValue, check_schema, decode

Policy = Literal["uniform", "adaptive"]
"""`uniform`: every kept layer keeps the same counts. `adaptive`: counts differ per layer, as in the paper."""

PLAN_SCHEMA = 3
"""Since 2, a plan may name a refit; since 3, the tokens that logits are computed of. It is written as the first version
that has what it names."""


_ORIGIN = ("schema_version", "shape", "policy", "strategy_id", "model_id", "refit_id")
"""Keys of a plan that say where it came from."""


@dataclass(frozen=True, slots=True, order=True)
class Shape:
    """Depth (number of kept layers) and width (kept fraction of a kept layer's prunable weights)."""

    depth: int
    width: float

    @classmethod
    def parse(cls, text: str) -> Shape:
        """Read `DEPTHxWIDTH`, such as `24x0.75`. Raises `BadValue`."""
        match = re.fullmatch(r"([0-9]{1,9})x([0-9]{1,9}(?:\.[0-9]{1,99})?)", text.strip())
        if not match or not int(match[1]) or not 0 < float(match[2]) <= 1:
            raise BadValue("A shape", text, "DEPTHxWIDTH with a width above 0 and at most 1, such as 24x0.75")
        return cls(int(match[1]), float(match[2]))

    def __str__(self) -> str:
        return f"{self.depth}x{self.width:g}"


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerPlan:
    """What one kept layer keeps, as sorted indices into the supernet's layer `source_layer`.

    Attributes:
        source_layer: Index of the layer in the supernet.
        query_heads: Kept query heads. Every kept KV head serves the same number of them.
        kv_heads: Kept KV heads; query head `q` reads KV head `q // heads_per_kv` of the supernet.
        ffn: Kept FFN neurons, or experts in a mixture of experts.
    """

    source_layer: int
    query_heads: tuple[int, ...]
    kv_heads: tuple[int, ...]
    ffn: tuple[int, ...]

    @property
    def counts(self) -> tuple[int, int, int]:
        """How many query heads, KV heads and neurons stay."""
        return len(self.query_heads), len(self.kv_heads), len(self.ffn)


def nearest_gate_width(gate_widths: Sequence[float], width: float) -> float | None:
    """The width choice that a SMoL gate is asked for by a plan of `width`: the nearest, the wider of two.

    None without a gate. The full model has width 1.
    """
    return min(gate_widths, key=lambda choice: (abs(choice - width), -choice), default=None)


@dataclass(frozen=True, slots=True, kw_only=True)
class SubnetPlan:
    """One subnet, named weight by weight. Same plan, same supernet, same adapters: same bytes.

    Attributes:
        shape: The requested shape.
        policy: How the width is spread over the layers.
        layers: The kept layers, by increasing `source_layer`.
        width_key: For an imported strategy: the width in the strategy that has the masks and biases. Otherwise None,
            and the biases come from the strategy's input means.
        compensate: Whether removed channels are replaced by their mean (a bias on o_proj and down_proj).
        gate_width: The width that a SMoL gate gets; None if no adapter has a gate.
        strategy_id: sha256 of the strategy of the plan; None for a plan without a strategy.
        model_id: `Supernet.identity` of the model of the plan, or None.
        refit_id: sha256 of the refit of this cut; None if the weights are not fitted.
        head_tokens: Sorted ids of the tokens that have logits; None for all.
    """

    shape: Shape
    policy: Policy
    layers: tuple[LayerPlan, ...]
    width_key: float | None = None
    compensate: bool = True
    gate_width: float | None = None
    strategy_id: str | None = None
    model_id: str | None = None
    refit_id: str | None = None
    head_tokens: tuple[int, ...] | None = None

    @classmethod
    def full(
        cls, architecture: Architecture, *, gate_widths: Sequence[float] = (), model_id: str | None = None
    ) -> SubnetPlan:
        """The plan that keeps everything. `Supernet.full_plan` gives the two facts that are not of its dims."""
        layer_indices = range(architecture.num_layers)
        return cls(
            shape=Shape(architecture.num_layers, 1.0),
            policy="uniform",
            layers=tuple(
                LayerPlan(
                    source_layer=i,
                    query_heads=tuple(range(architecture.num_heads)),
                    kv_heads=tuple(range(architecture.num_kv_heads)),
                    ffn=tuple(range(architecture.ffn_size)),
                )
                for i in layer_indices
            ),
            gate_width=nearest_gate_width(gate_widths, 1.0),
            model_id=model_id,
        )

    @property
    def geometry(self) -> str:
        """sha256 over what layers keep and what is computed with it: equal plans of different origin have the same."""
        facts = {key: value for key, value in self.to_json().items() if key not in (*_ORIGIN, "head_tokens")}
        return hashlib.sha256(json.dumps(facts, sort_keys=True, separators=(",", ":")).encode()).hexdigest()

    def keeps_everything(self, architecture: Architecture) -> bool:
        """Whether nothing is cut."""
        return len(self.layers) == architecture.num_layers and all(
            len(layer.query_heads) == architecture.num_heads and len(layer.ffn) == architecture.ffn_size
            for layer in self.layers
        )

    @property
    def kept_layers(self) -> tuple[int, ...]:
        """Supernet indices of the kept layers."""
        return tuple(layer.source_layer for layer in self.layers)

    def active_layers(self, num_layers: int) -> tuple[int, ...]:
        """The 0/1 vector of kept layers, `num_layers` long: the SMoL gate's first input."""
        kept = set(self.kept_layers)
        return tuple(int(i in kept) for i in range(num_layers))

    @property
    def compensation(self) -> Compensation:
        """Which blocks get a compensation bias."""
        if not self.compensate:
            return "none"
        return "removed" if self.width_key is None else "all"

    def has_o_bias(self, layer: LayerPlan, architecture: Architecture) -> bool:
        """Whether o_proj of `layer` gets a compensation bias (the source's own bias apart)."""
        return has_compensation(self.compensation, kept=len(layer.query_heads), whole=architecture.num_heads)

    def has_down_bias(self, layer: LayerPlan, architecture: Architecture) -> bool:
        """Whether down_proj of `layer` gets a compensation bias (the source's own bias apart)."""
        return architecture.has_down_bias(self.compensation, kept=len(layer.ffn))

    def is_compensated(self, architecture: Architecture) -> bool:
        """Whether any layer gets a compensation bias: only a strategy has what it is made of."""
        return any(
            self.has_o_bias(layer, architecture) or self.has_down_bias(layer, architecture) for layer in self.layers
        )

    def dense(self, architecture: Architecture) -> DenseArchitecture:
        """The dims of the cut model."""
        return DenseArchitecture(
            base=architecture.with_head(len(self.head_tokens) if self.head_tokens else None),
            layers=tuple(
                architecture.cut_layer(
                    len(layer.query_heads),
                    len(layer.kv_heads),
                    len(layer.ffn),
                    compensation=self.compensation,
                    kind=architecture.kind_index(layer.source_layer),
                )
                for layer in self.layers
            ),
        )

    def to_json(self) -> dict[str, Any]:
        """The content of `plan.json`."""
        return {
            "schema_version": PLAN_SCHEMA if self.head_tokens else 1 if self.refit_id is None else 2,
            "shape": str(self.shape),
            "policy": self.policy,
            "width_key": self.width_key,
            "compensate": self.compensate,
            "gate_width": self.gate_width,
            "strategy_id": self.strategy_id,
            "model_id": self.model_id,
            **({} if self.refit_id is None else {"refit_id": self.refit_id}),
            **({} if self.head_tokens is None else {"head_tokens": list(self.head_tokens)}),
            "layers": [
                {
                    "source_layer": layer.source_layer,
                    "query_heads": list(layer.query_heads),
                    "kv_heads": list(layer.kv_heads),
                    "ffn": list(layer.ffn),
                }
                for layer in self.layers
            ],
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any], *, where: str | None = None) -> SubnetPlan:
        """Read what `to_json` wrote. Raises `InputError` naming the first key that is wrong."""
        next_step = "Give the plan.json of an artifact, or write one with 'amoeba search --json'."
        try:
            if not isinstance(data, Mapping):
                raise WrongValue("plan", "is not a table")
            if "schema_version" not in data:
                raise WrongValue("", "has no schema_version")
            again = "Write the plan again with this version of amoeba."
            check_schema(data, PLAN_SCHEMA, since=1, what="plan", where=where, next_step=again)
            return decode(cls, {key: value for key, value in data.items() if key != "schema_version"})
        except WrongValue as error:
            raise InputError(f"This is not a plan: {error}.", where=where, next_step=next_step) from error
