"""Adapters of checkpoints that store several matrices as one: what they do to the parts."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from pathlib import Path

import torch

from amoeba_export.errors import DamagedFile, WrongModel
from amoeba_export.ir import Adapter, AdapterDelta, SubnetPlan, TensorSource
from amoeba_export.load.adapter_names import AdapterWeights
from amoeba_export.load.fused import Rows, Shapes


class SplitAdapter:
    """An `Adapter` of fused modules, seen as one of their parts.

    Rows of W + scale * B @ A are those of B, and DoRA has a norm for each row: a part has all of A and its rows of B.
    """

    def __init__(self, adapter: Adapter, parts: Mapping[str, Rows]) -> None:
        """`parts`: module -> where it is in a fused module, for those that `adapter` changes."""
        self._adapter, self._parts = adapter, dict(parts)
        self.input, self.width_choices = adapter.input, adapter.width_choices

    def modules(self) -> Collection[str]:
        """Supernet module names it changes."""
        fused = {rows.name for rows in self._parts.values()}
        return {*self._parts, *(name for name in self._adapter.modules() if name not in fused)}

    def delta(self, module: str, plan: SubnetPlan) -> AdapterDelta | None:
        """The change of `module` for `plan`, or None when there is none."""
        rows = self._parts.get(module)
        if rows is None:
            return self._adapter.delta(module, plan)
        whole = self._adapter.delta(rows.name, plan)
        if whole is None:
            return None
        part = slice(rows.start, rows.stop)
        magnitude_O = None if whole.magnitude_O is None else whole.magnitude_O[part]
        return dataclasses.replace(whole, b_OR=whole.b_OR[part], magnitude_O=magnitude_O)


class OwnParts:
    """A `TensorSource` in which rows of some weights have names of their own."""

    def __init__(self, files: TensorSource, parts: Mapping[str, Rows]) -> None:
        self._files, self._parts = files, dict(parts)

    def names(self) -> Collection[str]:
        """Every weight there is."""
        return {*self._files.names(), *self._parts}

    def shape(self, name: str) -> tuple[int, ...]:
        """From the header alone."""
        rows = self._parts.get(name)
        return self._files.shape(name) if rows is None else (rows.stop - rows.start, *self._files.shape(rows.name)[1:])

    def dtype(self, name: str) -> torch.dtype:
        """From the header alone."""
        rows = self._parts.get(name)
        return self._files.dtype(name if rows is None else rows.name)

    def read(self, name: str) -> torch.Tensor:
        """The whole weight. Raises `DamagedFile`, `NonFiniteWeights`."""
        rows = self._parts.get(name)
        return self._files.read(name) if rows is None else self._files.read(rows.name)[rows.start : rows.stop]


def with_split_modules(adapter: Adapter, parts: Mapping[str, Rows], where: Path) -> Adapter:
    """`adapter` by the modules that the model has.

    Args:
        adapter: As its file names modules.
        parts: Weight -> where it is: `parts_of` the model.
        where: The file.

    Raises:
        DamagedFile: It changes a matrix twice, as a whole and as a part.
    """
    changed = set(adapter.modules())
    split = {}
    for weight, rows in parts.items():
        module, fused = weight.removesuffix(".weight"), rows.name.removesuffix(".weight")
        if fused in changed:
            if module in changed:
                raise DamagedFile(where, f"it changes {module} and {fused}, which holds it")
            split[module] = dataclasses.replace(rows, name=fused)
    return SplitAdapter(adapter, split) if split else adapter


def with_split_weights(
    weights: AdapterWeights, source: TensorSource, parts: Mapping[str, Rows], stored: Shapes, where: Path
) -> tuple[AdapterWeights, TensorSource]:
    """Whole weights by the names that the model has, and a source that has these.

    Args:
        weights: As the file names them.
        source: The file.
        parts: Weight -> where it is: `parts_of` the model.
        stored: Name -> shape of fused weights.
        where: The file.

    Raises:
        WrongModel: A fused weight of another shape.
        DamagedFile: A matrix is there twice, as a whole and as a part.
    """
    own, split = dict(weights.own), {}
    for weight, rows in parts.items():
        if rows.name not in weights.own:
            continue
        name = weights.own[rows.name]
        if weight in weights.own:
            raise DamagedFile(where, f"it has {weight} and {rows.name}, which holds it")
        if source.shape(name) != stored[rows.name]:
            found, needed = list(source.shape(name)), list(stored[rows.name])
            raise WrongModel("The adapter", [f"{name} has shape {found}, this model needs {needed}"], where=where)
        own.pop(rows.name, None)
        part = f"{name}[{rows.start}:{rows.stop}]"
        own[weight], split[part] = part, dataclasses.replace(rows, name=name)
    return dataclasses.replace(weights, own=own), OwnParts(source, split) if split else source
