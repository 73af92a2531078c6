"""GGUF files opened: what the header says, where each tensor lies, and its values in fp32.

The header is read here, not by the `gguf` package's reader: a declared length is believed only as far as the file
goes, and a vocabulary of 150,000 tokens takes a fraction of a second. The package knows the types and dequantizes.
"""

from __future__ import annotations

import math
import mmap
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from amoeba_export.errors import DamagedFile, NotFound, UnsupportedError

if TYPE_CHECKING:
    import gguf
    import numpy as np
    from numpy.typing import NDArray

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_ALIGNMENT = 32
_MAX_ITEMS = 1 << 24
"""Tensors, keys or items of an array: more is damage, not a model."""
_PART = re.compile(r"-(\d{5})-of-(\d{5})\.gguf$")

# Value types by number: struct code, or None for the two that have a length.
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9


@dataclass(frozen=True, slots=True, kw_only=True)
class GgufTensor:
    """One tensor: shape in torch's order, the slowest axis first."""

    name: str
    shape: tuple[int, ...]
    kind: gguf.GGMLQuantizationType
    path: Path
    offset: int
    size_bytes: int

    def read(self) -> NDArray[np.float32]:
        """Its values in fp32, in memory of their own.

        Raises:
            UnsupportedError: Its type cannot be dequantized, or holds no floating point weights.
        """
        import gguf
        import numpy as np

        raw = np.fromfile(self.path, dtype=np.uint8, count=self.size_bytes, offset=self.offset)
        rows = raw.reshape(*self.shape[:-1], -1)
        try:
            values = gguf.dequantize(rows, self.kind)
        except NotImplementedError as error:
            raise UnsupportedError(
                f"The tensor {self.name} has the type {self.kind.name}, which cannot be dequantized here.",
                where=self.path,
                next_step="Give the model in another quantization, such as Q8_0, or unquantized.",
            ) from error
        return np.ascontiguousarray(values, dtype=np.float32).reshape(self.shape)


@dataclass(frozen=True, slots=True, kw_only=True)
class GgufFile:
    """One GGUF file, or all parts of a split one.

    Attributes:
        paths: The files, the one with the metadata first.
        fields: Every key with its value: a number, a string, a bool, or a list.
        tensors: By name.
    """

    paths: tuple[Path, ...]
    fields: Mapping[str, Any]
    tensors: Mapping[str, GgufTensor]

    @property
    def path(self) -> Path:
        """The file that the user knows it by."""
        return self.paths[0]


def gguf_parts(path: Path) -> tuple[Path, ...]:
    """The files of a model of which `path` is one, by their names: `NAME-00001-of-00003.gguf` has two sisters.

    Raises:
        NotFound: A part is not there.
    """
    match = _PART.search(path.name)
    if match is None:
        return (path,)
    stem, count = path.name[: match.start()], int(match[2])
    parts = [path.with_name(f"{stem}-{idx:05d}-of-{match[2]}.gguf") for idx in range(1, min(count, 9999) + 1)]
    for part in parts:
        if not part.is_file():
            raise NotFound(
                "A part of the split GGUF file",
                part,
                next_step=f"Put all {count} parts into one folder, or merge them: llama-gguf-split --merge FIRST OUT.",
            )
    return tuple(parts)


def open_gguf(path: Path) -> GgufFile:
    """Read the header of a GGUF file, and of its other parts when it is split.

    Raises:
        NotFound: A part is missing.
        DamagedFile: It is not a GGUF file, or says things that its size does not bear out.
        UnsupportedError: A version or a byte order that we do not read.
    """
    parts = [_open_one(part) for part in gguf_parts(path)]
    declared = parts[0].fields.get("split.count", 0)
    if max(int(declared), 1) != len(parts):
        raise DamagedFile(
            path,
            f"it says that it is one of {declared} parts, and its name does not",
            next_step="Give the parts their names back (NAME-00001-of-0000N.gguf), or merge them: "
            "llama-gguf-split --merge FIRST OUT.",
        )
    tensors: dict[str, GgufTensor] = {}
    for part in parts:
        for name, tensor in part.tensors.items():
            if name in tensors:
                raise DamagedFile(part.path, f"{name} is also in {tensors[name].path.name}")
            tensors[name] = tensor
    expected = parts[0].fields.get("split.tensors.count", len(tensors))
    if expected != len(tensors):
        raise DamagedFile(path, f"its parts hold {len(tensors)} tensors and should hold {expected}")
    return GgufFile(paths=tuple(part.path for part in parts), fields=parts[0].fields, tensors=tensors)


def _open_one(path: Path) -> GgufFile:
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as view:
            return _Header(path, view).read()
    except (struct.error, UnicodeDecodeError, OSError, ValueError, OverflowError) as error:
        raise DamagedFile(path, str(error)) from error


class _Header:
    """A cursor over the header. Raises `ValueError` or `struct.error` where the file ends too early."""

    def __init__(self, path: Path, view: mmap.mmap) -> None:
        self._path = path
        self._view = view
        self._size = len(view)
        self._position = 0

    def read(self) -> GgufFile:
        if self._view[:4] != _MAGIC:
            raise ValueError("it does not begin as a GGUF file does")
        self._position = 4
        version = self._number("I")
        if version not in _VERSIONS:
            swapped = int.from_bytes(version.to_bytes(4, "little"), "big")
            raise UnsupportedError(
                "A big-endian GGUF file is not supported."
                if swapped in _VERSIONS
                else f"Version {version} of GGUF is not supported.",
                where=self._path,
                next_step="Convert the model again with a current llama.cpp, on a little-endian machine.",
            )
        num_tensors, num_fields = self._count(24), self._count(13)
        fields: dict[str, Any] = {}
        for _ in range(num_fields):
            key = self._string()
            if key in fields:
                raise ValueError(f"the key {key} is there twice")
            fields[key] = self._value(self._number("I"))
        infos = [self._tensor_info() for _ in range(num_tensors)]
        alignment = fields.get("general.alignment", _ALIGNMENT)
        if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
            raise ValueError(f"its alignment is {alignment!r}")
        start = -(-self._position // alignment) * alignment
        tensors: dict[str, GgufTensor] = {}
        for name, shape, kind, offset in infos:
            if name in tensors:
                raise ValueError(f"{name} is there twice")
            tensors[name] = self._placed(name, shape, kind, start + offset)
        return GgufFile(paths=(self._path,), fields=fields, tensors=tensors)

    def _number(self, code: str) -> Any:
        (value,) = struct.unpack_from(f"<{code}", self._view, self._position)
        self._position += struct.calcsize(f"<{code}")
        return value

    def _count(self, item_bytes: int) -> int:
        """A declared number of items of at least `item_bytes`, no more than the rest of the file can hold."""
        count = int(self._number("Q"))
        if count > min((self._size - self._position) // item_bytes, _MAX_ITEMS):
            raise ValueError(f"it declares {count} items where {self._size - self._position} bytes are left")
        return count

    def _string(self) -> str:
        length = int(self._number("Q"))
        if length > self._size - self._position:
            raise ValueError(f"it declares {length} letters where {self._size - self._position} bytes are left")
        text = self._view[self._position : self._position + length]
        self._position += length
        # A vocabulary may hold bytes that are no text; they come back as they were.
        return text.decode("utf-8", errors="surrogateescape")

    def _value(self, kind: int) -> Any:
        if kind == _STRING:
            return self._string()
        if kind in _SCALARS:
            return self._number(_SCALARS[kind])
        if kind != _ARRAY:
            raise ValueError(f"there is no value type {kind}")
        item = self._number("I")
        if item == _STRING:
            return [self._string() for _ in range(self._count(8))]
        if item not in _SCALARS:
            raise ValueError(f"an array of type {item} is not read")
        code = _SCALARS[item]
        count = self._count(struct.calcsize(f"<{code}"))
        values = struct.unpack_from(f"<{count}{code}", self._view, self._position)
        self._position += struct.calcsize(f"<{count}{code}")
        return list(values)

    def _tensor_info(self) -> tuple[str, tuple[int, ...], int, int]:
        name = self._string()
        num_axes = self._number("I")
        if not 1 <= num_axes <= 4:
            raise ValueError(f"{name} has {num_axes} axes")
        fastest_first = [int(self._number("Q")) for _ in range(num_axes)]
        return name, tuple(reversed(fastest_first)), self._number("I"), int(self._number("Q"))

    def _placed(self, name: str, shape: tuple[int, ...], number: int, offset: int) -> GgufTensor:
        import gguf

        kind = gguf.GGMLQuantizationType(number)
        block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
        if not all(shape) or shape[-1] % block:
            raise ValueError(f"{name} has shape {list(shape)}, which {kind.name} does not store")
        size_bytes = math.prod(shape) // block * block_bytes
        if offset + size_bytes > self._size:
            raise ValueError(f"{name} ends {offset + size_bytes - self._size} bytes beyond the end of the file")
        return GgufTensor(name=name, shape=shape, kind=kind, path=self._path, offset=offset, size_bytes=size_bytes)
