"""Safetensors files written weight by weight.

The header of every shard is known before the first weight, so space is reserved, and each weight goes straight to its
place. Nothing but the weight at hand is in memory.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from amoeba_export.errors import NotRepresentable
from amoeba_export.formats.awaited import Awaited
from amoeba_export.ir import TensorSpec
from amoeba_export.ir.safetensors_header import safetensors_header
from amoeba_export.load.experts import Pieces
from amoeba_export.reserved_file import ReservedFile, check_space

_CHUNK_BYTES = 32 << 20
"""How much of a weight is converted at once: a 7B embedding in fp32 would be half a gigabyte."""

MAX_SHARD_BYTES = 5_000_000_000
"""As the Hugging Face hub cuts large models."""

NOTHING: Mapping[str, str] = {}


NOT_IN_PIECES: Mapping[str, Pieces] = {}


_Dtypes = Mapping[str, torch.dtype]


@dataclass(frozen=True, slots=True)
class _Shard:
    path: Path
    header: bytes
    offsets: dict[str, int]
    size_bytes: int


class SafetensorsWriter:
    """Shards whose headers are written first, and weights that may come in any order.

    Args:
        folder: Where the shards go.
        specs: Weights that `accept` will be given.
        zeros: Weights that are zero and never given. Their place in the file is left as it was reserved.
        layers_prefix: What names of layers' weights begin with, to put them in order; None where they are.
        fused: Weight -> the weight of the file that it is part of, one under the other in the order of `specs`.
        pieces: Weight -> the weights of the file that it is split into.
        dtype: Of weights that do not say theirs.
        limit: No shard with more than one weight has more bytes of weights.
    """

    def __init__(
        self,
        folder: Path,
        specs: Sequence[TensorSpec],
        *,
        zeros: Sequence[TensorSpec],
        layers_prefix: str | None = None,
        fused: Mapping[str, str] = NOTHING,
        pieces: Mapping[str, Pieces] = NOT_IN_PIECES,
        dtype: torch.dtype,
        limit: int,
    ) -> None:
        self._awaited = Awaited({spec.name: spec.shape for spec in specs}, folder)
        self._pieces = pieces
        self._dtypes = {spec.name: spec.dtype or dtype for spec in (*specs, *zeros)}
        for name in pieces.keys() & self._dtypes.keys():
            self._dtypes |= dict.fromkeys(pieces[name].names, self._dtypes[name])
        stored = [part for spec in _together(specs, fused) for part in _apart(spec, pieces)]
        kinds = self._dtypes | {fused[spec.name]: self._dtypes[spec.name] for spec in specs if spec.name in fused}
        in_order = sorted([*stored, *zeros], key=lambda spec: _layer_of(spec.name, layers_prefix))
        shards = _lay_out(folder, in_order, kinds, limit)
        self._place = {name: (shard, offset) for shard in shards for name, offset in shard.offsets.items()}
        filled: dict[str, int] = {}
        for spec in specs:
            if (whole := fused.get(spec.name)) is not None:
                shard, offset = self._place[whole]
                self._place[spec.name] = (shard, offset + filled.get(whole, 0))
                filled[whole] = filled.get(whole, 0) + math.prod(spec.shape) * kinds[whole].itemsize
        needed = sum(shard.size_bytes for shard in shards)
        check_space(folder, needed)  # all shards together, before the first one
        self._files = {shard.path: ReservedFile(shard.path, shard.size_bytes) for shard in shards}
        for shard in shards:
            self._files[shard.path].write(shard.header, 0)
        if len(shards) > 1:
            weight_map = {name: shard.path.name for shard in shards for name in shard.offsets}
            weight_map = dict(sorted(weight_map.items()))
            total = sum(shard.size_bytes - len(shard.header) for shard in shards)
            index = {"metadata": {"total_size": total}, "weight_map": weight_map}
            text = json.dumps(index, indent=2) + "\n"
            (folder / "model.safetensors.index.json").write_text(text, encoding="utf-8")

    def accept(self, name: str, weight: torch.Tensor) -> None:
        """Write one weight to its place.

        Raises:
            WeightsMismatch: It is unknown, given twice, or of another shape.
            NotRepresentable: fp16 cannot hold its values.
            DiskFull: The space that was reserved is not there after all.
        """
        self._awaited.given(name, weight)
        place = self._pieces.get(name)
        if place is None:
            self._write(name, weight)
        else:
            for piece, part in zip(place.names, weight.chunk(len(place.names), place.dim), strict=True):
                self._write(piece, part)

    def _write(self, name: str, weight: torch.Tensor) -> None:
        shard, offset = self._place[name]
        flat = weight.reshape(-1)
        dtype = self._dtypes[name]
        step = _CHUNK_BYTES // dtype.itemsize
        for start in range(0, flat.numel(), step):
            part = flat[start : start + step].to(dtype)
            if dtype is torch.float16 and not torch.isfinite(torch.stack(torch.aminmax(part))).all():
                raise NotRepresentable.in_fp16(name)
            data = part.view(torch.uint8).numpy().data
            self._files[shard.path].write(data, offset + start * dtype.itemsize)

    def close(self) -> None:
        """Close the shards, unsynced. Raises `WeightsMismatch` when a weight was not given."""
        for file in self._files.values():
            file.close()
        self._files = {}
        self._awaited.check_complete()


def _together(specs: Sequence[TensorSpec], fused: Mapping[str, str]) -> list[TensorSpec]:
    """What the file has: weights that are parts of one stand together, where the first of them stood."""
    stored: dict[str, TensorSpec] = {}
    for spec in specs:
        name = fused.get(spec.name, spec.name)
        rows = stored[name].shape[0] if name in stored else 0
        shape = (rows + spec.shape[0], *spec.shape[1:])
        stored[name] = TensorSpec(name=name, shape=shape, dtype=spec.dtype)
    return list(stored.values())


def _apart(spec: TensorSpec, pieces: Mapping[str, Pieces]) -> list[TensorSpec]:
    """What the file has in place of a weight."""
    if (place := pieces.get(spec.name)) is None:
        return [spec]
    shape = list(spec.shape)
    shape[place.dim] //= len(place.names)
    return [TensorSpec(name=name, shape=tuple(shape), dtype=spec.dtype) for name in place.names]


def _lay_out(folder: Path, specs: Sequence[TensorSpec], dtypes: _Dtypes, limit: int) -> list[_Shard]:
    """Assign weights to shards in order and compute each shard's header."""
    groups: list[list[TensorSpec]] = [[]]
    filled = 0
    for spec in specs:
        size = math.prod(spec.shape) * dtypes[spec.name].itemsize
        if groups[-1] and filled + size > limit:
            groups.append([])
            filled = 0
        groups[-1].append(spec)
        filled += size
    shards = []
    for number, group in enumerate(groups, 1):
        single = len(groups) == 1
        name = "model.safetensors" if single else f"model-{number:05}-of-{len(groups):05}.safetensors"
        shards.append(_shard(folder / name, group, dtypes))
    return shards


def _layer_of(name: str, prefix: str | None) -> int:
    """Zero biases join the layer that they belong to; Python's sort keeps the order otherwise."""
    return int(name.removeprefix(prefix).partition(".")[0]) if prefix and name.startswith(prefix) else -1


def _shard(path: Path, specs: Sequence[TensorSpec], dtypes: _Dtypes) -> _Shard:
    header, offsets, size_bytes = safetensors_header(specs, dtypes, metadata={"format": "pt"})
    return _Shard(path, header, offsets, size_bytes)
