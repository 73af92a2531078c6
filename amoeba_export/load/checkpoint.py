"""Weights in safetensors files: headers checked when opened, bytes mapped when a weight is asked for."""

from __future__ import annotations

import math
import mmap
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from amoeba_export.errors import DamagedFile, NonFiniteWeights, NotFound, UnsupportedError, WeightsMismatch
from amoeba_export.ir.dtype import FLOATS
from amoeba_export.load.quantized import dequantize, packed_weights, read_state
from amoeba_export.reading import MAX_NAME_BYTES, is_name_too_long, parse_json_object, read_json_object
from amoeba_export.reading.bounds import shown

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"

_DTYPES = {"F64": torch.float64, **{dtype.safetensors_name: dtype.torch_dtype for dtype in FLOATS.values()}}
_PACKED_DTYPES = {"U8": torch.uint8, "I8": torch.int8}
"""Of the parts of quantized weights."""

Rename = Callable[[str], str | None]


@dataclass(frozen=True, slots=True)
class _Entry:
    path: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int
    parts: Mapping[str, _Entry] = field(default_factory=dict)
    """Of a quantized weight, see `quantized.py`; dtype and shape are then those of what it stands for."""


class Checkpoint:
    """A `TensorSource` over one or more safetensors files.

    Every weight gets a memory map of its own, which goes away with the tensor: what was read and dropped does not count
    as memory in use, however large the files are. A map of the whole file would keep every page it ever touched.
    """

    def __init__(self, files: Iterable[Path], weights: Mapping[str, _Entry]) -> None:
        self.files = tuple(files)
        self._weights = dict(weights)
        self._finite: set[str] = set()

    def names(self) -> Collection[str]:
        """Every weight there is."""
        return self._weights.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        """From the header alone."""
        return self._weights[name].shape

    def dtype(self, name: str) -> torch.dtype:
        """From the header alone."""
        return self._weights[name].dtype

    def read(self, name: str) -> torch.Tensor:
        """The whole weight, over the mapped file; a quantized one in memory of its own.

        Raises:
            DamagedFile: The file is shorter than it was when it was opened, or the parts of a weight do not fit.
            NonFiniteWeights: It has NaN or infinity in it.
        """
        entry = self._weights[name]
        weight = _dequantized(name, entry) if entry.parts else _mapped(name, entry)
        if name not in self._finite:
            _check_finite(name, weight, entry.path)
            self._finite.add(name)
        return weight


def _mapped(name: str, entry: _Entry) -> torch.Tensor:
    size_bytes = math.prod(entry.shape) * entry.dtype.itemsize
    page_start = entry.offset // mmap.ALLOCATIONGRANULARITY * mmap.ALLOCATIONGRANULARITY
    skipped = entry.offset - page_start
    try:
        with entry.path.open("rb") as file:
            # ACCESS_COPY: torch wants a writable buffer, and a write by mistake must not reach the user's file.
            view = mmap.mmap(file.fileno(), skipped + size_bytes, access=mmap.ACCESS_COPY, offset=page_start)
    except (OSError, ValueError) as error:
        raise DamagedFile(entry.path, f"{name} can no longer be read ({error})") from error
    raw = torch.frombuffer(view, dtype=torch.uint8, count=size_bytes, offset=skipped)
    if entry.offset % entry.dtype.itemsize:  # a header of odd length; not every processor reads across words
        raw = raw.clone()
    return raw.view(entry.dtype).view(entry.shape)


def _dequantized(name: str, entry: _Entry) -> torch.Tensor:
    try:
        return dequantize({part: _mapped(name, its) for part, its in entry.parts.items()}, entry.dtype)
    except (ValueError, KeyError, IndexError) as error:
        raise DamagedFile(entry.path, f"{name} cannot be dequantized ({error})") from error


def _check_finite(name: str, weight: torch.Tensor, path: Path) -> None:
    # Either end is NaN or infinite when any item is. One pass at memory speed and nothing allocated; isfinite() makes a
    # tensor of flags and took 25 times as long.
    low, high = torch.aminmax(weight)
    if not (torch.isfinite(low) and torch.isfinite(high)):
        raise NonFiniteWeights(name, f"NaN or infinity in {path}")


def weight_files(folder: Path) -> tuple[Path, ...]:
    """The safetensors files of a checkpoint folder.

    Raises:
        NotFound: There are none, or the index names one that is not there.
        DamagedFile: The index is not an index.
    """
    if (folder / SINGLE).is_file():
        return (folder / SINGLE,)
    if not (folder / INDEX).is_file():
        next_step = "Give a Hugging Face model folder with model.safetensors, or shards and their index."
        if any(folder.glob("*.bin")):
            next_step = "Its weights are pickled (.bin): save the model once with transformers' save_pretrained."
        raise NotFound("A safetensors checkpoint", folder / SINGLE, next_step=next_step)
    shards = sorted(set(_read_index(folder / INDEX).values()))
    for shard in shards:
        if not (folder / shard).is_file():
            raise NotFound(
                "A shard of the checkpoint", folder / shard, next_step="Get the missing file and put it there."
            )
    return tuple(folder / shard for shard in shards)


def _read_index(path: Path) -> dict[str, str]:
    weight_map = read_json_object(path, what="The index of shards").get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise DamagedFile(path, "its weight_map is not a table")
    for shard in weight_map.values():
        if not isinstance(shard, str) or PurePath(shard).name != shard:
            raise DamagedFile(path, f"it names a shard outside its folder: {shown(shard)}")
        if is_name_too_long(shard):
            raise DamagedFile(path, f"it names a shard by more than {MAX_NAME_BYTES} bytes, which no file system holds")
    return weight_map


def open_checkpoint(
    folder: Path,
    expected: Mapping[str, tuple[int, ...]],
    *,
    copies: Mapping[str, str] | None = None,
    ignored: Collection[str] = (),
    rename: Rename | None = None,
) -> Checkpoint:
    """Open a checkpoint and check its headers against the weights that the architecture implies.

    Args:
        folder: Has `model.safetensors`, or shards and `model.safetensors.index.json`.
        expected: Name -> shape.
        copies: Name -> the expected weight that it repeats (tied embeddings). It may be there, or stand in for it.
        ignored: Names that may be there and are left alone.
        rename: What a weight of the files is called here, or None for one that is left alone; names are kept without.

    Raises:
        NotFound: A file is missing.
        DamagedFile: A file is truncated, or its header is not sound.
        WeightsMismatch: Weights are missing, left over, or have another shape.
        UnsupportedError: A weight is not floating point.
    """
    copies = copies or {}
    files = weight_files(folder)
    found: dict[str, _Entry] = {}
    for path in files:
        for name, entry in _read_header(path, rename).items():
            if name in found:
                raise DamagedFile(path, f"{name} is also in {found[name].path.name}")
            found[name] = entry
    if len(files) > 1 or files[0].name != SINGLE:
        _check_index(folder / INDEX, found, rename)
    found = _folded(found)
    repeated = {name: found.pop(name) for name in copies if name in found}
    for name, entry in repeated.items():
        found.setdefault(copies[name], entry)
    problems = [f"{name} is missing" for name in expected if name not in found]
    problems += [f"{name} is left over" for name in found if name not in expected and name not in ignored]
    problems += [
        f"{name} has shape {list(found[name].shape)} and should have {list(shape)}"
        for name, shape in expected.items()
        if name in found and found[name].shape != shape
    ]
    if problems:
        raise WeightsMismatch(problems, where=folder)
    for name, entry in repeated.items():
        _check_copy(name, entry, copies[name], found)
    return Checkpoint(files, {name: found[name] for name in expected})


def _check_copy(name: str, entry: _Entry, original: str, found: Mapping[str, _Entry]) -> None:
    """A weight that the config calls tied must be what it is tied to. transformers would quietly not tie it."""
    if entry == found[original]:
        return
    both = Checkpoint((), {name: entry, original: found[original]})
    if not torch.equal(both.read(name), both.read(original)):
        raise WeightsMismatch([f"{name} is tied to {original} and differs from it"], where=entry.path)


def open_file(path: Path) -> Checkpoint:
    """One safetensors file with whatever weights it has. Raises `DamagedFile`, `UnsupportedError`."""
    entries = _read_header(path)
    _check_floating(entries)
    return Checkpoint([path], entries)


def _folded(found: Mapping[str, _Entry]) -> dict[str, _Entry]:
    """The tensors of each quantized weight as one entry. Whatever is then no floating point weight is refused."""
    packed = {name: parts for name, parts in packed_weights(set(found)).items() if name in found}
    of_others = {tensor for parts in packed.values() for tensor in parts.values()}
    entries = {name: entry for name, entry in found.items() if name not in of_others}
    _check_floating(entries)
    unpacked = next((entry.dtype for entry in entries.values()), torch.float16)  # int8 does not say what it was
    for name, parts in packed.items():
        whole = found[name]
        shape, dtype = whole.shape, unpacked
        if "state" in parts:
            try:
                shape, dtype = read_state(_mapped(name, found[parts["state"]]))
            except (ValueError, KeyError) as error:
                raise DamagedFile(whole.path, f"the quantization state of {name} cannot be read ({error})") from error
        entries[name] = _Entry(
            whole.path, dtype, shape, whole.offset, {part: found[tensor] for part, tensor in parts.items()}
        )
    return entries


def _check_floating(entries: Mapping[str, _Entry]) -> None:
    for name, entry in entries.items():
        if not entry.dtype.is_floating_point:
            kind = next(kind for kind, dtype in _PACKED_DTYPES.items() if dtype == entry.dtype)
            raise _not_floating(name, kind, entry.path)


def _not_floating(name: str, kind: str, path: Path) -> UnsupportedError:
    return UnsupportedError(
        f"The weight {name} has the type {kind}; only floating point weights can be cut.",
        where=path,
        next_step="Give a checkpoint in fp32, fp16 or bf16.",
    )


def _check_index(index: Path, found: Mapping[str, _Entry], rename: Rename | None) -> None:
    for name, shard in _read_index(index).items():
        known = rename(name) if rename else name
        if known is not None and (known not in found or found[known].path.name != shard):
            raise DamagedFile(index, f"it promises {name} in {shard}, which does not have it")


def stored_names(folder: Path) -> set[str]:
    """Every name in the files of a checkpoint folder. Raises as `weight_files` and for a header that is not sound."""
    return {name for path in weight_files(folder) for name in _header(path)[0]}


def _header(path: Path) -> tuple[dict[str, Any], int]:
    """What a file says of its weights, and where their bytes start.

    safetensors checks that offsets are ordered, gapless and match shapes and file.
    """
    try:
        with safe_open(path, framework="pt"):
            pass
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = parse_json_object(file.read(length))
    except (SafetensorError, OSError, ValueError) as error:
        raise DamagedFile(path, str(error)) from error
    return {name: facts for name, facts in header.items() if name != "__metadata__"}, 8 + length


def _read_header(path: Path, rename: Rename | None = None) -> dict[str, _Entry]:
    """Name -> where a weight lies."""
    entries: dict[str, _Entry] = {}
    header, start = _header(path)
    for stored, facts in header.items():
        name = rename(stored) if rename else stored
        if name is None:
            continue
        if name in entries:
            raise DamagedFile(path, f"{name} is there under two names")
        kind = _DTYPES.get(facts["dtype"]) or _PACKED_DTYPES.get(facts["dtype"])
        if kind is None:
            raise _not_floating(name, facts["dtype"], path)
        offset = start + facts["data_offsets"][0]
        entries[name] = _Entry(path, kind, tuple(facts["shape"]), offset)
    return entries
