"""Shards of a transformers folder."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from amoeba_export.errors import DamagedFile
from amoeba_export.ir import Family
from amoeba_export.ir.dtype import float_name, is_float
from amoeba_export.verify.stored import packed
from amoeba_export.verify.stored.tensor import Shapes, Stored, Wanted

_INDEX = "model.safetensors.index.json"


class SafetensorsWeights:
    """See `StoredWeights`. Biases that only a stock type wants must be zero: they are listed like all others.

    Args:
        folder: Where the shards are.
        wanted: What they must have; None to read whatever they have.
    """

    def __init__(self, folder: Path, wanted: Wanted | None) -> None:
        self.sums: Mapping[str, tuple[str, ...]] = {}
        self._shapes: Shapes = wanted.shapes if wanted else {}
        self._shards: dict[str, Path] = {}
        paths = sorted(folder.glob("*.safetensors"))
        if not paths:
            raise DamagedFile(folder, "it has no weights")
        for path in paths:
            try:
                with safe_open(path, framework="pt") as shard:
                    names = list(shard.keys())
            except (SafetensorError, OSError) as error:
                raise DamagedFile(path, f"it is not a safetensors file ({error})") from error
            for name in names:
                if name in self._shards:
                    raise DamagedFile(path, f"{name} is in {self._shards[name].name} as well")
                self._shards[name] = path
        self._parts = self._split(wanted.family) if wanted else {}
        self._pieces = self._apart(wanted) if wanted else {}
        self._check_index(folder / _INDEX, several=len(paths) > 1)

    def _apart(self, wanted: Wanted) -> dict[str, tuple[str, ...]]:
        """Weight -> those in the files that hold one expert of it each, where they do."""
        modules = {held.role: held.module for held in wanted.family.experts}
        pieces: dict[str, tuple[str, ...]] = {}
        for name in self._shapes:
            place = wanted.family.place(name)
            if place.role in modules and place.layer is not None and name not in self._shards:
                experts = range(wanted.dense.layers[place.layer].ffn_size)
                module = modules[place.role]
                pieces[name] = tuple(f"{module.format(layer=place.layer, expert=i)}.{place.part}" for i in experts)
        return {name: held for name, held in pieces.items() if self._shards.keys() >= set(held)}

    def _split(self, family: Family) -> dict[str, tuple[str, int]]:
        """Weight -> the one in the files that it is part of, and its first row there."""
        parts: dict[str, tuple[str, int]] = {}
        for name in self._shapes:
            place = family.place(name)
            for fused in family.fused:
                whole = f"{fused.module.format(layer=place.layer)}.{place.part}"
                if place.role in fused.roles and whole in self._shards:
                    before = fused.roles[: fused.roles.index(place.role)]
                    names = [f"{family.module(role, place.layer)}.{place.part}" for role in before]
                    parts[name] = (whole, sum(self._shapes[other][0] for other in names))
        return parts

    def _check_index(self, path: Path, *, several: bool) -> None:
        """A reader that goes by the index must come to the same files."""
        if not path.is_file():
            if several:
                raise DamagedFile(path, "it is missing beside several shards")
            return
        try:
            listed = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise DamagedFile(path, f"it is not an index ({type(error).__name__}: {error})") from error
        if listed != {name: shard.name for name, shard in self._shards.items()}:
            raise DamagedFile(path, "it does not list what the shards have")

    def names(self) -> Collection[str]:
        """See `StoredWeights`. The parts of a packed weight go by its name."""
        wholes = {whole for whole, _ in self._parts.values()}.union(*self._pieces.values())
        stored = (name for name in packed.weight_names(self._shards) if name not in wholes)
        return [*stored, *self._parts, *self._pieces]

    def read(self, name: str) -> Stored:
        """See `StoredWeights`."""
        parts = packed.part_names(name)
        if parts["weight_packed"] in self._shards:
            return self._unpacked(name, parts)
        if name in self._pieces:
            return self._joined(name)
        whole, start = self._parts.get(name, (name, 0))
        path = self._shards[whole]
        tensor = self._tensor(whole)
        if name in self._parts:
            self._check_rows(path, whole, tensor)
            tensor = tensor[start : start + self._shapes[name][0]]
        if not is_float(tensor.dtype):
            raise DamagedFile(path, f"{name} is of type {tensor.dtype}")
        self._check_shape(path, name, tensor)
        return Stored(values=tensor.float(), dtype=float_name(tensor.dtype))

    def _joined(self, name: str) -> Stored:
        """One expert after the other, along the axis in which a piece is not as large as the whole."""
        pieces, wanted = [self._tensor(piece) for piece in self._pieces[name]], self._shapes[name]
        path = self._shards[self._pieces[name][0]]
        if len({(piece.dtype, tuple(piece.shape)) for piece in pieces}) > 1 or not is_float(pieces[0].dtype):
            raise DamagedFile(path, f"the experts of {name} are not alike")
        dim = 0 if pieces[0].shape[-1:] == wanted[-1:] else 1
        if pieces[0].dim() != len(wanted):
            raise DamagedFile(path, f"the experts of {name} are not matrices")
        whole = torch.cat(pieces, dim)
        self._check_shape(path, name, whole)
        return Stored(values=whole.float(), dtype=float_name(whole.dtype))

    def _unpacked(self, name: str, parts: Mapping[str, str]) -> Stored:
        path = self._shards[parts["weight_packed"]]
        tensors = {part: self._tensor(key) for part, key in parts.items() if key in self._shards}
        try:
            stored = packed.unpack(tensors)
        except ValueError as error:
            raise DamagedFile(path, f"{name} is not packed as W4A16: {error}") from error
        self._check_shape(path, name, stored.values)
        return stored

    def _tensor(self, name: str) -> torch.Tensor:
        with safe_open(self._shards[name], framework="pt") as shard:
            tensor: torch.Tensor = shard.get_tensor(name)
        return tensor

    def _check_shape(self, path: Path, name: str, tensor: torch.Tensor) -> None:
        expected = self._shapes.get(name)
        if expected is not None and tuple(tensor.shape) != expected:
            raise DamagedFile(path, f"{name} is {list(tensor.shape)}, and the plan keeps {list(expected)}")

    def _check_rows(self, path: Path, whole: str, tensor: torch.Tensor) -> None:
        """A fused weight has the rows of its parts and no others."""
        rows = sum(self._shapes[part][0] for part, (name, _) in self._parts.items() if name == whole)
        if len(tensor) != rows:
            raise DamagedFile(path, f"{whole} has {len(tensor)} rows, and the plan keeps {rows}")
