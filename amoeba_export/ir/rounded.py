"""Weights of one cut whose integers were chosen with data, for one precision: what a format that has them stores."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol

if TYPE_CHECKING:
    import torch


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


class BlockQuantizer(Protocol):
    """What rounds whole blocks of a row by a search of its own."""

    @property
    def block_size(self) -> int:
        """Weights of a block."""

    @property
    def kind(self) -> int:
        """The number of its type in GGUF."""

    def quantize(self, w_OI: torch.Tensor, importance_I: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows of whole blocks as bytes, and the values [O, I] that they stand for. Errors count by `importance_I`."""


class RoundedSource(Protocol):
    """A `TensorSource` that has some matrices as bytes of their type, too."""

    def names(self) -> Collection[str]:
        """See `TensorSource`."""

    def shape(self, name: str) -> tuple[int, ...]:
        """See `TensorSource`."""

    def dtype(self, name: str) -> torch.dtype:
        """See `TensorSource`."""

    def read(self, name: str) -> torch.Tensor:
        """See `TensorSource`."""

    def packed(self, name: str) -> torch.Tensor | None:
        """Bytes [O, N] of a matrix that a quantizer of the format has rounded; None for another."""


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

    tensors: RoundedSource
    geometry: str
    model_id: str
    adapters: tuple[str, ...]
    refit_id: str | None
    format: str
    dtype: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    identity: str
