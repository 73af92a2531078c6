"""A cut model on its way to disk: known in shape before the first weight is computed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from amoeba_export.ir.dense import DenseArchitecture
from amoeba_export.ir.family import Family
from amoeba_export.ir.plan import SubnetPlan

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorSpec:
    """One weight of a cut model, under its family's name, layers renumbered from 0.

    Attributes:
        dtype: What it has in a file that keeps the source's types, or None for `Subnet.source_dtype`.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Subnet:
    """A cut model: dims, the plan it follows, and a stream of its weights.

    Attributes:
        family: Says which role a name has, and which name a role.
        specs: Every weight, in stream order. Tied embeddings appear once, as the embedding. A block without heads (or
            neurons) has no projections and no norms; the bias of its writer may remain.
        stream: Opens the stream of (name, weight [shape of its spec]), each name exactly once, in the order of
            `specs`. Weights come in the source's dtype unless an adapter or bias made them; writers convert. The
            consumer may keep or drop them, never write into them.
        source_folder: Where tokenizer, chat template, generation config and licence are copied from.
        tokenizer_folder: Where tokenizer and chat template are copied from instead, or None.
        source_dtype: `Supernet.dtype`: what a file that keeps the source's types says of them all.
    """

    architecture: DenseArchitecture
    family: Family
    plan: SubnetPlan
    specs: tuple[TensorSpec, ...]
    stream: Callable[[], Iterator[tuple[str, torch.Tensor]]]
    source_folder: Path
    source_dtype: torch.dtype
    model_name: str
    tokenizer_folder: Path | None = None


class Writer(Protocol):
    """One container being written. Takes each weight once, in any order; knows all shapes beforehand."""

    def accept(self, name: str, weight: torch.Tensor) -> None:
        """Write one weight. A name that it does not know or already has is an error."""

    def close(self) -> None:
        """Finish the files. Raises if a weight is missing."""
