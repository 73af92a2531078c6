"""Checkpoints that store several matrices as one: what we see are the parts."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch

from amoeba_export.ir import Family, TensorSource

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class Rows:
    """Where a weight is: rows of one in the files."""

    name: str
    start: int
    stop: int


def parts_of(family: Family, expected: Shapes, num_layers: int) -> dict[str, Rows]:
    """Weight -> where it is, for every weight of `expected` that the files store as part of another."""
    places: dict[str, Rows] = {}
    for fused in family.fused:
        for layer in range(num_layers):
            start = 0
            for role in fused.roles:
                name = family.weight(role, layer)
                if name in expected:
                    stop = start + expected[name][0]
                    places[name] = Rows(f"{fused.module.format(layer=layer)}.weight", start, stop)
                    start = stop
    return places


def stored_shapes(expected: Shapes, parts: Mapping[str, Rows]) -> dict[str, tuple[int, ...]]:
    """Name -> shape of what the files have."""
    shapes: dict[str, tuple[int, ...]] = {}
    for name, shape in expected.items():
        rows = parts.get(name)
        if rows is None:
            shapes[name] = shape
        else:
            before = shapes.get(rows.name, (0, *shape[1:]))
            shapes[rows.name] = (before[0] + shape[0], *shape[1:])
    return shapes


def put_together(
    weights: Iterable[tuple[str, torch.Tensor]], expected: Shapes, parts: Mapping[str, Rows]
) -> Iterator[tuple[str, torch.Tensor]]:
    """`weights`, those that the files store as part of another joined as soon as all parts are there."""
    groups: dict[str, list[str]] = {}
    for name in expected:
        if name in parts:
            groups.setdefault(parts[name].name, []).append(name)
    held: dict[str, torch.Tensor] = {}
    for name, weight in weights:
        if name not in parts:
            yield name, weight
            continue
        held[name] = weight
        group = groups[parts[name].name]
        if all(other in held for other in group):
            yield parts[name].name, torch.cat([held.pop(other) for other in group])
    assert not held, sorted(held)


class SplitTensors:
    """A `TensorSource` over files whose fused weights are seen as their parts."""

    def __init__(self, files: TensorSource, expected: Shapes, parts: Mapping[str, Rows]) -> None:
        self._files, self._expected, self._parts = files, expected, parts

    def names(self) -> Collection[str]:
        """Every weight there is."""
        return self._expected.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        """From the header alone."""
        return self._expected[name]

    def dtype(self, name: str) -> torch.dtype:
        """From the header alone."""
        rows = self._parts.get(name)
        return self._files.dtype(name if rows is None else rows.name)

    def read(self, name: str) -> torch.Tensor:
        """The whole weight. Raises `DamagedFile`."""
        rows = self._parts.get(name)
        if rows is None:
            return self._files.read(name)
        return self._files.read(rows.name)[rows.start : rows.stop]
