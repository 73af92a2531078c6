"""Weights of one cut whose integers were chosen with data, for one precision: what a format that has them stores."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from amoeba_export.ir.supernet import TensorSource


RoundingHow = Literal["data", "nearest"]
"""Ways to choose the integers of a matrix."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Grid:
    """What a format holds: blocks of 4-bit integers along the inputs.

    Attributes:
        block_size: Weights that share a step.
        has_offsets: The smallest value of a block is free; else levels are -8 to 7 steps.
        step_dtype: What steps are stored in.
        whole_zeros: It is free by whole steps, so that some level is zero.
    """

    block_size: int
    has_offsets: bool
    step_dtype: Literal["fp32", "fp16", "bf16"]
    whole_zeros: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundedWeights:
    """Matrices on their grids, and the vectors that were scaled with them.

    Attributes:
        tensors: By the name that they have in the cut model, at its shapes. They take the place of its own.
        geometry: `SubnetPlan.geometry` of the plan that they are for.
        model_id: `Supernet.identity` of the model.
        adapters: sha256 of the adapters that were applied, in order.
        refit_id: Identity of the refit that they were rounded from, or None.
        format: What they are for.
        dtype: The precision that it has then.
        settings: Recipe, tokens, seed: what is needed to repeat it.
        identity: sha256 of the file.
    """

    tensors: TensorSource
    geometry: str
    model_id: str
    adapters: tuple[str, ...]
    refit_id: str | None
    format: str
    dtype: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    identity: str
