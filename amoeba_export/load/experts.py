"""Checkpoints that store the matrices of each expert apart: what we see is one matrix for all of a layer.

`gate` and `up` [F, D] hold the rows of one expert after the other, `down` [D, F] the columns; F = E * neurons of one.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch

from amoeba_export.errors import UnsupportedAdapter
from amoeba_export.ir import Architecture, Family, TensorSource

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class Pieces:
    """Where a weight is: several of the files, side by side along `dim`."""

    names: tuple[str, ...]
    dim: int


def pieces_of(family: Family, architecture: Architecture) -> dict[str, Pieces]:
    """Weight -> where it is, for every weight that the files store in pieces."""
    places: dict[str, Pieces] = {}
    for layer in range(architecture.num_layers):
        places |= pieces_of_layer(family, layer, architecture.ffn_size)
    return places


def pieces_of_layer(family: Family, layer: int, num_experts: int) -> dict[str, Pieces]:
    """The same of one layer that has so many experts."""
    dims = {template.role: template.axes.index("ffn") for template in family.layer if "ffn" in template.axes}
    return {
        family.weight(held.role, layer): Pieces(
            tuple(f"{held.module.format(layer=layer, expert=expert)}.weight" for expert in range(num_experts)),
            dims[held.role],
        )
        for held in family.experts
        if num_experts
    }


def shapes_in_pieces(expected: Shapes, pieces: Mapping[str, Pieces]) -> dict[str, tuple[int, ...]]:
    """Name -> shape of what the files have."""
    shapes: dict[str, tuple[int, ...]] = {}
    for name, shape in expected.items():
        place = pieces.get(name)
        if place is None:
            shapes[name] = shape
            continue
        piece = list(shape)
        piece[place.dim] //= len(place.names)
        shapes |= dict.fromkeys(place.names, tuple(piece))
    return shapes


class JoinedTensors:
    """A `TensorSource` over files whose weights in pieces are seen whole."""

    def __init__(self, files: TensorSource, expected: Shapes, pieces: Mapping[str, Pieces]) -> None:
        self._files, self._expected, self._pieces = files, expected, pieces

    def names(self) -> Collection[str]:
        """Every weight there is."""
        return self._expected.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        """From the header alone."""
        return self._expected[name]

    def dtype(self, name: str) -> torch.dtype:
        """From the headers alone: the widest type of the pieces."""
        place = self._pieces.get(name)
        if place is None:
            return self._files.dtype(name)
        first, *rest = {self._files.dtype(piece) for piece in place.names}
        for other in rest:
            first = torch.promote_types(first, other)
        return first

    def read(self, name: str) -> torch.Tensor:
        """The whole weight, in memory of its own where it is in pieces. Raises `DamagedFile`."""
        place = self._pieces.get(name)
        if place is None:
            return self._files.read(name)
        kind = self.dtype(name)
        return torch.cat([self._files.read(piece).to(kind) for piece in place.names], dim=place.dim)


def refuse_experts(names: Collection[str], family: Family, where: object) -> None:
    """Raise `UnsupportedAdapter` for the first of `names` that changes experts or their router."""
    if not family.experts:
        return
    changed = (family.expert_list.format(layer=0), family.module("router", 0))
    inside = [module.removeprefix(family.layer_prefix(0)) for module in changed]
    for name in names:
        if any(f".{module}." in name for module in inside):
            raise UnsupportedAdapter(f"{name}: a change of experts or of what picks them", where=str(where))
