"""One stored weight."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch

from amoeba_export.ir import DenseArchitecture, Family

Shapes = Mapping[str, tuple[int, ...]]
"""Name and shape of every weight of a cut model."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """What a file must have, before any weight is read.

    Attributes:
        shapes: Of every weight.
        family: Says which role a name has.
        dense: The cut model.
        head_tokens: Tokens that logits are computed of; None for all.
    """

    shapes: Shapes
    family: Family
    dense: DenseArchitecture
    head_tokens: tuple[int, ...] | None = None


BITS = {"int8": 8, "int4": 4, "w4a16": 4}


@dataclass(frozen=True, slots=True, kw_only=True)
class Searched:
    """Scales that were chosen by a search, each [rows, blocks].

    Attributes:
        levels: Integers that a value may have: 0 and up with offsets, as many on both sides of 0 without.
        steps: Of the integers; of either sign.
        offsets: What is subtracted from them, or None.
        unit: What a step is a multiple of; 0 where it is stored as a number of its own.
        offset_unit: The same of an offset.
        together: Blocks that share a unit; 0 for none.
        scale_levels: Units of the largest step.
    """

    levels: int
    steps: torch.Tensor
    offsets: torch.Tensor | None
    unit: torch.Tensor
    offset_unit: torch.Tensor
    together: int = 0
    scale_levels: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Stored:
    """One weight as a file has it.

    Attributes:
        values: What the runtime computes with, in fp32.
        dtype: The `--dtype` that is stored like it.
        steps: Of integers: the scale of each block along the last axis [rows, blocks].
        block: Of integers: values that share a scale. The last block may reach beyond the values.
        half_steps: Of integers: whether scales are stored in 16 bits.
        searched: Of integers whose scales are no plain function of their block: the scales, in place of `steps`.
        offset: What the file adds to the weight of a norm, since its runtime does not.
        factor: What the file multiplies a weight by, since its runtime does not scale so: values = factor * (weight +
            offset).
    """

    values: torch.Tensor
    dtype: str
    steps: torch.Tensor | None = None
    block: int = 0
    half_steps: bool = False
    searched: Searched | None = None
    offset: float = 0.0
    factor: float = 1.0

    def of_model(self) -> torch.Tensor:
        """The weight as the family has it."""
        return self.values / self.factor - self.offset if self.offset or self.factor != 1.0 else self.values

    def as_stored(self, weight: torch.Tensor) -> torch.Tensor:
        """A weight of the family as this file should have it."""
        return (weight + self.offset) * self.factor if self.offset or self.factor != 1.0 else weight


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
