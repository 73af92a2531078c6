"""How the weights of a cut model become stored tensors: which bytes of the data file each fills, and in what form."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch

from amoeba_export.errors import NotRepresentable
from amoeba_export.formats.onnx.data import DataFile, Layout, Region
from amoeba_export.formats.onnx.datatype import DataType
from amoeba_export.formats.onnx.graph import Recorder, Value
from amoeba_export.formats.onnx.precision import TORCH_DTYPES, Blockwise, Precision
from amoeba_export.formats.onnx.quantize import quantize_rows

_CHUNK_BYTES = 8 << 20


class Placement(Protocol):
    """Where one weight goes and how it is encoded."""

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape that the weight must have."""

    def write(self, file: DataFile, name: str, weight: torch.Tensor) -> None:
        """Encode `weight` and write it, a few MB at a time."""


@dataclass(frozen=True, slots=True)
class Plain:
    """Rows of a stored tensor, converted to its dtype.

    Attributes:
        offset: Added to every value first, in fp32.
    """

    shape: tuple[int, ...]
    region: Region
    row_start: int
    offset: float = 0.0

    def write(self, file: DataFile, name: str, weight: torch.Tensor) -> None:
        """See `Placement`. Raises `NotRepresentable` when fp16 cannot hold a value."""
        dtype = TORCH_DTYPES[self.region.dtype]
        for start, rows in _row_chunks(weight):
            converted = (rows.float() + self.offset if self.offset else rows).to(dtype).contiguous()
            if dtype is torch.float16 and not torch.isfinite(converted).all():
                raise NotRepresentable.in_fp16(name)
            file.write(self.region, self.row_start + start, converted.view(torch.uint8).numpy())


@dataclass(frozen=True, slots=True)
class Turned:
    """A whole stored matrix, transposed to [in, out]."""

    shape: tuple[int, ...]
    region: Region

    def write(self, file: DataFile, name: str, weight: torch.Tensor) -> None:
        """See `Placement`."""
        Plain(self.region.shape, self.region, 0).write(file, name, weight.T)


@dataclass(frozen=True, slots=True)
class Rows:
    """Some rows of a weight, in the order given, as a stored matrix of their own."""

    shape: tuple[int, ...]
    rows: tuple[int, ...]
    placement: Placement

    def write(self, file: DataFile, name: str, weight: torch.Tensor) -> None:
        """See `Placement`."""
        self.placement.write(file, name, weight[list(self.rows)])


@dataclass(frozen=True, slots=True)
class Both:
    """One weight in two places."""

    first: Placement
    second: Placement

    @property
    def shape(self) -> tuple[int, ...]:
        """See `Placement`."""
        return self.first.shape

    def write(self, file: DataFile, name: str, weight: torch.Tensor) -> None:
        """See `Placement`."""
        self.first.write(file, name, weight)
        self.second.write(file, name, weight)


@dataclass(frozen=True, slots=True)
class Stacked:
    """A stored tensor of matrices, one per expert, that lie along `dim` in the weight."""

    shape: tuple[int, ...]
    region: Region
    dim: int

    def write(self, file: DataFile, name: str, weight: torch.Tensor) -> None:
        """See `Placement`."""
        count, rows, columns = self.region.shape
        flat = Region(self.region.name, self.region.dtype, (count * rows, columns), self.region.offset)
        for idx, piece in enumerate(weight.chunk(count, self.dim)):
            Plain((rows, columns), flat, idx * rows).write(file, name, piece)


@dataclass(frozen=True, slots=True)
class Blocks:
    """Rows of a block-quantized matrix."""

    shape: tuple[int, ...]
    packed: Region
    scales: Region
    zero_points: Region | None
    row_start: int
    encoding: Blockwise

    def write(self, file: DataFile, name: str, weight: torch.Tensor) -> None:
        """See `Placement`."""
        for start, rows in _row_chunks(weight):
            made = quantize_rows(rows.float(), self.encoding)
            file.write(self.packed, self.row_start + start, made.packed)
            file.write(self.scales, self.row_start + start, made.scales.astype(self.scales.dtype.numpy(), copy=False))
            if self.zero_points is not None and made.zero_points is not None:
                file.write(self.zero_points, self.row_start + start, made.zero_points)


@dataclass(frozen=True, slots=True, kw_only=True)
class Matrix:
    """A stored linear weight [rows, columns] (out, in), or its quantized form."""

    rows: int
    columns: int
    region: Region
    scales: Region | None = None
    zero_points: Region | None = None
    encoding: Blockwise | None = None


@dataclass
class WeightStore:
    """Reserves the data file's tensors as the graph asks for them and remembers what fills them.

    Attributes:
        placements: By source weight name.
        tables: Tensors that are computed here, such as RoPE tables.
        norms: Names of the stored weights of norms.
    """

    recorder: Recorder
    precision: Precision
    layout: Layout = field(default_factory=Layout)
    placements: dict[str, Placement] = field(default_factory=dict)
    tables: list[tuple[Region, npt.NDArray[np.generic]]] = field(default_factory=list)
    norms: set[str] = field(default_factory=set)

    def vector(self, name: str, parts: Sequence[tuple[str, int]]) -> Value:
        """A stored vector made of one or more weights (name, length), one after the other."""
        region = self.layout.reserve(name, self.precision.activation, (sum(size for _, size in parts),))
        start = 0
        for source, size in parts:
            self._place(source, Plain((size,), region, start))
            start += size
        return self.recorder.stored(region)

    def norm(self, name: str, size: int, offset: float) -> Value:
        """What a norm multiplies with: `offset` plus the weight `name`."""
        region = self.layout.reserve(name, self.precision.activation, (size,))
        self._place(name, Plain((size,), region, 0, offset))
        self.norms.add(name)
        return self.recorder.stored(region)

    def matrix(
        self, name: str, parts: Sequence[tuple[str, int]], columns: int, *, encoding: Blockwise | None
    ) -> Matrix:
        """A stored matrix made of one or more weights (name, rows) with the same columns, stacked."""
        rows = sum(size for _, size in parts)
        if encoding is None:
            region = self.layout.reserve(name, self.precision.activation, (rows, columns))
            self._place_rows(parts, lambda size, start: Plain((size, columns), region, start))
            return Matrix(rows=rows, columns=columns, region=region)
        encoding = encoding.for_columns(columns)
        blocks = encoding.num_stored_blocks(columns)
        packed = self.layout.reserve(f"{name}_q{encoding.bits}", DataType.UINT8, (rows, blocks, encoding.blob_bytes))
        scales = self.layout.reserve(f"{name}_scales", self.precision.activation, (rows, blocks))
        zero_points = None
        if row_bytes := encoding.zero_point_bytes(columns):
            zero_points = self.layout.reserve(f"{name}_zero_points", DataType.UINT8, (rows, row_bytes))
        self._place_rows(
            parts, lambda size, start: Blocks((size, columns), packed, scales, zero_points, start, encoding)
        )
        return Matrix(
            rows=rows, columns=columns, region=packed, scales=scales, zero_points=zero_points, encoding=encoding
        )

    def turned(self, name: str, rows: int, columns: int) -> Value:
        """One weight [rows, columns] stored as [columns, rows]."""
        region = self.layout.reserve(name, self.precision.activation, (columns, rows))
        self._place(name, Turned((rows, columns), region))
        return self.recorder.stored(region)

    def take_rows(self, name: str, source: str, rows: Sequence[int], num_rows: int) -> None:
        """Fill the stored matrix `name` with rows of the weight `source`, which may be stored whole besides."""
        inner = self.placements.pop(name)
        taken = Rows((num_rows, *inner.shape[1:]), tuple(rows), inner)
        whole = self.placements.get(source)
        self.placements[source] = taken if whole is None else Both(whole, taken)

    def experts(self, name: str, count: int, rows: int, columns: int, *, dim: int) -> Value:
        """One weight as `count` matrices [rows, columns], which lie in it along `dim`."""
        region = self.layout.reserve(name, self.precision.activation, (count, rows, columns))
        shape = (rows * count, columns) if dim == 0 else (rows, columns * count)
        self._place(name, Stacked(shape, region, dim))
        return self.recorder.stored(region)

    def table(self, name: str, values: npt.NDArray[np.generic], dtype: DataType) -> Value:
        """A stored tensor whose values are known now."""
        region = self.layout.reserve(name, dtype, values.shape)
        self.tables.append((region, values.astype(dtype.numpy())))
        return self.recorder.stored(region)

    def _place_rows(self, parts: Sequence[tuple[str, int]], placement: Callable[[int, int], Placement]) -> None:
        start = 0
        for source, size in parts:
            self._place(source, placement(size, start))
            start += size

    def _place(self, source: str, placement: Placement) -> None:
        assert source not in self.placements, source
        self.placements[source] = placement


def _row_chunks(weight: torch.Tensor) -> Iterator[tuple[int, torch.Tensor]]:
    """Consecutive rows of `weight`, about `_CHUNK_BYTES` of fp32 at a time, with the index of the first one."""
    step = max(1, _CHUNK_BYTES * len(weight) // max(1, 4 * weight.numel()))
    for start in range(0, len(weight), step):
        yield start, weight[start : start + step]
