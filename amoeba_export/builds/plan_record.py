"""A plan in a build report: what its picture needs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from amoeba_export.ir import Architecture, Policy, SubnetPlan


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerRecord:
    """What one kept layer keeps. Heads are indices into the supernet's layer; units of the FFN are a count.

    Attributes:
        source_layer: Index of the layer in the supernet.
        query_heads: Indices of the kept query heads.
        kv_heads: Indices of the kept KV heads.
        ffn: Number of kept FFN units.
    """

    source_layer: int
    query_heads: tuple[int, ...]
    kv_heads: tuple[int, ...]
    ffn: int


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanRecord:
    """A plan as a picture needs it, beside the supernet's dims that it is a part of. `plan.json` has every index.

    Attributes:
        shape: DEPTHxWIDTH.
        policy: `uniform` or `adaptive`.
        layers: The kept layers.
        num_layers: Layers of the supernet.
        num_heads: Query heads of a layer of the supernet.
        num_kv_heads: KV heads of a layer of the supernet.
        ffn_size: FFN units of a layer of the supernet.
        units: What the FFN units are.
    """

    shape: str
    policy: Policy
    layers: tuple[LayerRecord, ...]
    num_layers: int
    num_heads: int
    num_kv_heads: int
    ffn_size: int
    units: Literal["neurons", "experts"] = "neurons"

    def __post_init__(self) -> None:
        if min(self.num_layers, self.num_heads, self.num_kv_heads, self.ffn_size) < 1:
            raise ValueError(f"plan {self.shape}: the supernet has no layers, heads or FFN units")

    @classmethod
    def of(cls, plan: SubnetPlan, architecture: Architecture) -> PlanRecord:
        """The record of `plan`."""
        return cls(
            shape=str(plan.shape),
            policy=plan.policy,
            layers=tuple(
                LayerRecord(
                    source_layer=layer.source_layer,
                    query_heads=layer.query_heads,
                    kv_heads=layer.kv_heads,
                    ffn=len(layer.ffn),
                )
                for layer in plan.layers
            ),
            num_layers=architecture.num_layers,
            num_heads=architecture.num_heads,
            num_kv_heads=architecture.num_kv_heads,
            ffn_size=architecture.ffn_size,
            units=architecture.units,
        )
