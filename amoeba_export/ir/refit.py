"""Weights of one cut that were fitted after it was cut: by least squares (`refit`) or by distillation (`heal`)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from amoeba_export.ir.supernet import TensorSource

RefitKind = Literal["refit", "heal"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Refit:
    """Final weights of some modules of a cut: they take the place of what would be sliced, merged and compensated.

    Attributes:
        tensors: By the name that they have in the cut model (layers renumbered), at their cut shape. Adapters are in
            them already.
        geometry: `SubnetPlan.geometry` of the plan that they are for.
        model_id: `Supernet.identity` of the model.
        adapters: sha256 of the adapters that were applied, in order.
        kind: How they were made.
        settings: Recipe, tokens, seed: what is needed to repeat it.
        losses: Text -> `full`, `cut` and `refit`: mean negative log-likelihood of a token in nats.
        identity: sha256 of the file.
    """

    tensors: TensorSource
    geometry: str
    model_id: str
    adapters: tuple[str, ...] = ()
    kind: RefitKind = "refit"
    settings: Mapping[str, Any] = field(default_factory=dict)
    losses: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    identity: str
