"""Initializers of `model.onnx`.

A stored matrix may be several weights one under the other (`q_k_v_proj`), transposed (the second factor of MatMul), or
blocks of integers with scales beside them. Which, the nodes that read it say; that they read the right one, running the
graph says.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

from amoeba_export.errors import DamagedFile, WeightsMismatch
from amoeba_export.verify.stored.tensor import Stored, Wanted

MODEL_NAME = "model.onnx"

_QUANTIZED = re.compile(r"(?P<name>.*\.weight)_q(?P<bits>4|8)(?P<again>_rows)?")
_DTYPES = {onnx.TensorProto.FLOAT: "fp32", onnx.TensorProto.FLOAT16: "fp16", onnx.TensorProto.BFLOAT16: "bf16"}


@dataclass(frozen=True, slots=True)
class _Part:
    """Where one weight lies: rows of a stored tensor."""

    stored: str
    start: int


class OnnxWeights:
    """See `StoredWeights`."""

    def __init__(self, folder: Path, wanted: Wanted) -> None:
        self.sums: Mapping[str, tuple[str, ...]] = {}
        self._path = folder / MODEL_NAME
        self._shapes, self._family = wanted.shapes, wanted.family
        self._norm_offset = wanted.dense.base.norm_offset
        graph = read_model(self._path).graph
        self._tensors = {tensor.name: tensor for tensor in graph.initializer}
        if len(self._tensors) < len(graph.initializer):
            raise DamagedFile(self._path, "two initializers have one name")
        readers = [(node, i, name) for node in graph.node for i, name in enumerate(node.input)]
        self._blocks = {
            name: {one.name: one.i for one in node.attribute}
            for node, i, name in readers
            if node.op_type == "MatMulNBits" and i == 1
        }
        self._zero_points = {
            node.input[1]: node.input[3]
            for node in graph.node
            if node.op_type == "MatMulNBits" and len(node.input) > 3 and node.input[3]
        }
        self._turned = {name for node, i, name in readers if node.op_type == "MatMul" and i == 1}
        self._check_tokens(wanted)
        self._parts: dict[str, _Part] = {}
        for name in tuple(self._tensors):
            quantized = _QUANTIZED.fullmatch(name)
            if quantized and quantized["again"]:
                self._same_bytes(name, name.removesuffix("_rows"))
            else:
                self._find(quantized["name"] if quantized else name, name)

    def _check_tokens(self, wanted: Wanted) -> None:
        """The rows of a smaller head must be those of the plan's tokens. That the graph uses them, its logits say."""
        name = f"{self._family.module('head')}.tokens"
        if wanted.head_tokens is None:
            if name in self._tensors:
                raise WeightsMismatch([f"{name} is not part of this plan"], where=self._path)
            return
        found = self.array(name).reshape(-1)
        tokens = np.array(wanted.head_tokens)
        if len(found) != len(tokens):
            raise WeightsMismatch([f"{name} has {len(found)} tokens, not {len(tokens)}"], where=self._path)
        if wrong := int((found != tokens).sum()):
            first = int((found != tokens).argmax())
            problem = f"{name} has {wrong} other tokens than the plan, the first at row {first}"
            raise WeightsMismatch([problem], where=self._path)

    def _find(self, name: str, stored: str) -> None:
        """Note which weights `stored` is made of: those that the plan has."""
        names = [name] if name in self._shapes else self._stacked(name)
        if name.endswith("_scales") or not all(one in self._shapes for one in names):
            if re.search(r"\.(weight|bias)$", name):
                self._parts[name] = _Part(stored, 0)  # of no weight of the plan
            return
        start = 0
        for one in names:
            self._parts[one] = _Part(stored, start)
            start += self._shapes[one][0]
        dims = list(self._tensors[stored].dims)
        if len(dims) == 3 and stored == name:  # of experts, which `read` looks at
            return
        rows = dims[-1 if stored in self._turned else 0]
        if start != rows:
            raise DamagedFile(self._path, f"{name} has {rows} rows, and the plan keeps {start}")

    def _stacked(self, name: str) -> list[str]:
        """The weights of the plan that a stored name says to be one under the other, or the name itself."""
        module, _, end = name.rpartition(".")
        block, _, stem = module.rpartition(".")
        pieces = stem.split("_")
        for count in range(2, len(pieces)):
            ending = "_".join(pieces[count:])
            names = [f"{block}.{piece}_{ending}.{end}" for piece in pieces[:count]]
            if all(one in self._shapes for one in names):
                return names
        return [name]

    def _same_bytes(self, name: str, other: str) -> None:
        """A second view of a matrix must be one of the same bytes."""
        places = [
            {entry.key: entry.value for entry in self._tensors[one].external_data}
            for one in (name, other)
            if one in self._tensors
        ]
        if len(places) == 1:
            self._tensors[other] = self._tensors[name]
            self._find(_QUANTIZED.fullmatch(other)["name"], other)  # type: ignore[index]
        elif places[0] != places[1]:
            raise DamagedFile(self._path, f"{name} and {other} are not the same")

    def names(self) -> Collection[str]:
        """See `StoredWeights`."""
        return self._parts.keys()

    def read(self, name: str) -> Stored:
        """See `StoredWeights`."""
        part = self._parts[name]
        values = self.array(part.stored)
        expected = self._shapes.get(name)
        if expected is None:
            return Stored(values=_float(values), dtype="fp32")
        rows = slice(part.start, part.start + expected[0])
        if quantized := _QUANTIZED.fullmatch(part.stored):
            return self._integers(quantized, values, rows, expected)
        if part.stored in self._turned:
            values = values.T
        if values.ndim == 3:
            values = self._together(name, values, expected)
        if tuple(values.shape[1:]) != expected[1:]:
            raise DamagedFile(self._path, f"{name} has rows of {list(values.shape[1:])}, not {list(expected[1:])}")
        dtype = _DTYPES.get(self._tensors[part.stored].data_type)
        if dtype is None:
            raise DamagedFile(self._path, f"{name} is no floating-point tensor")
        is_norm = self._family.place(name).role.endswith("_norm")
        return Stored(values=_float(values[rows]), dtype=dtype, offset=self._norm_offset if is_norm else 0.0)

    def _together(self, name: str, values: np.ndarray[Any, Any], expected: tuple[int, ...]) -> np.ndarray[Any, Any]:
        """Matrices of experts as one, along the axis in which one is not as large as all."""
        whole = np.concatenate(list(values), axis=0 if values.shape[2] == expected[1] else 1)
        if whole.shape != expected:
            raise DamagedFile(self._path, f"{name} is {list(values.shape)}, and the plan keeps {list(expected)}")
        return whole

    def _integers(
        self, match: re.Match[str], packed: np.ndarray[Any, Any], rows: slice, expected: tuple[int, ...]
    ) -> Stored:
        """Blocks of integers, with zero points where their node reads some.

        Then as many columns follow as there are blocks: the offset of each, as a weight of the sum of its inputs.
        """
        bits, name, columns = int(match["bits"]), match["name"], expected[1]
        scales = self.array(f"{name}_scales")
        num_rows = scales.shape[0]
        steps = _float(scales).reshape(num_rows, -1)[rows]
        packed = packed.reshape(num_rows, steps.shape[1], -1)
        block = packed.shape[2] * 8 // bits
        blocks, zero_name = -(-columns // block), self._zero_points.get(match.string)
        offsets = blocks if zero_name else 0
        facts = {"bits": bits, "block_size": block, "K": columns + offsets, "N": num_rows}
        said = self._blocks.get(match.string, facts)
        all_blocks = blocks + -(-offsets // block)
        if any(said.get(key) != value for key, value in facts.items()) or steps.shape[1] != all_blocks:
            raise DamagedFile(self._path, f"{name} has other blocks than its node says")
        if offsets and (bits != 4 or columns % block):
            raise DamagedFile(self._path, f"{name} has zero points, which it cannot have")
        whole = torch.from_numpy(_integers_of(packed[rows], bits).astype(np.float32))
        if zero_name:
            zero_points = self.array(zero_name).reshape(num_rows, -1)[rows]
            if zero_points.shape[1] != -(-all_blocks // 2):
                raise DamagedFile(self._path, f"{name} has {zero_points.shape[1]} bytes of zero points a row")
            whole -= torch.from_numpy(_integers_of(zero_points, 4)[:, :all_blocks, None].astype(np.float32))
        else:
            whole -= 2 ** (bits - 1)
        whole *= steps[..., None]
        if offsets:
            whole = whole[:, :blocks] + whole[:, blocks:].flatten(1)[:, :blocks, None]
        return Stored(
            values=whole.flatten(1)[:, :columns],
            dtype=f"int{bits}",
            steps=steps[:, :blocks],
            block=block,
            half_steps=scales.dtype != np.float32,
        )

    def array(self, name: str) -> np.ndarray[Any, Any]:
        """One initializer. External data is mapped, not read. Raises `DamagedFile`."""
        if name not in self._tensors:
            raise DamagedFile(self._path, f"it has no {name}")
        return initializer(self._tensors[name], self._path)


def _integers_of(packed: np.ndarray[Any, Any], bits: int) -> np.ndarray[Any, Any]:
    """What bytes hold: themselves, or two integers of 4 bits each, the first in the lower half."""
    if bits == 8:
        return packed
    return np.stack([packed & 15, packed >> 4], axis=-1).reshape(*packed.shape[:-1], -1)


def read_model(path: Path) -> onnx.ModelProto:
    """The graph, without external data. Raises `DamagedFile`."""
    try:
        return onnx.load(path, load_external_data=False)
    except (DecodeError, OSError, ValueError) as error:
        raise DamagedFile(path, f"it is not an ONNX model ({type(error).__name__})") from error


def initializer(tensor: onnx.TensorProto, path: Path) -> np.ndarray[Any, Any]:
    """The values of an initializer of the model at `path`; its external data lies in a file beside it.

    Raises:
        DamagedFile: The data lies elsewhere, or not in the file.
    """
    try:
        dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)
        if tensor.data_location != onnx.TensorProto.EXTERNAL:
            return onnx.numpy_helper.to_array(tensor)
    except (KeyError, TypeError, ValueError) as error:
        raise DamagedFile(path, f"{tensor.name} cannot be read ({error})") from error
    place = {entry.key: entry.value for entry in tensor.external_data}
    location = str(place.get("location", ""))
    if not location or Path(location).name != location or (path.parent / location).is_symlink():
        raise DamagedFile(path, f"the data of {tensor.name} is not beside it")
    shape = tuple(tensor.dims)
    size_bytes = math.prod(shape) * dtype.itemsize
    file = path.parent / location
    try:
        offset, length = int(place.get("offset", 0)), int(place.get("length", size_bytes))
        if min(shape, default=1) < 1 or offset < 0 or length != size_bytes or offset + length > file.stat().st_size:
            raise ValueError("another size")
    except (ValueError, OSError) as error:
        raise DamagedFile(path, f"the data of {tensor.name} is not in {location}") from error
    return np.memmap(file, mode="r", dtype=dtype, offset=offset, shape=shape)


def _float(values: np.ndarray[Any, Any]) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(values).astype(np.float32))
