"""One stored weight."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch

Shapes = Mapping[str, tuple[int, ...]]
"""Name and shape of every weight of a cut model."""

BITS = {"int8": 8, "int4": 4}


@dataclass(frozen=True, slots=True, kw_only=True)
class Stored:
    """One weight as a file has it.

    Attributes:
        values: What the runtime computes with, in fp32.
        dtype: `fp32`, `fp16`, `bf16`, `int8` or `int4`.
        steps: Of integers: the scale of each block along the last axis [rows, blocks].
        block: Of integers: values that share a scale. The last block may reach beyond the values.
        half_steps: Of integers: whether scales are stored in 16 bits.
    """

    values: torch.Tensor
    dtype: str
    steps: torch.Tensor | None = None
    block: int = 0
    half_steps: bool = False


class StoredWeights(Protocol):
    """The weights of one format of an artifact.

    Attributes:
        sums: Name of a stored weight -> weights of the cut model whose sum it is, where that is not itself alone.
    """

    sums: Mapping[str, tuple[str, ...]]

    def names(self) -> Collection[str]:
        """Every weight that is stored."""

    def read(self, name: str) -> Stored:
        """One weight. Raises `DamagedFile` when it is not of its shape in the plan."""
