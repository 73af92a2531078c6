"""Takes the weights of a cut model and writes `model.gguf`."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
import torch

from amoeba_export.errors import NotRepresentable
from amoeba_export.formats.awaited import Awaited
from amoeba_export.formats.gguf.architecture import choose_architecture
from amoeba_export.formats.gguf.hyperparameters import add_hyperparameters
from amoeba_export.formats.gguf.k_quants import K_QUANTS, k_quant_type
from amoeba_export.formats.gguf.layout import (
    BLOCK,
    expected_tensors,
    expert_after_expert,
    permute_pairs,
    q_factor,
    written_layers,
)
from amoeba_export.formats.gguf.rope import rope_factors
from amoeba_export.formats.gguf.rounding import equalizer, quantize_q4_0
from amoeba_export.formats.gguf.tokenizer import add_tokenizer
from amoeba_export.ir import DenseArchitecture, LayerDims, Role, Subnet
from amoeba_export.ir.dtype import DTYPES
from amoeba_export.ir.rounded import RoundedSource
from amoeba_export.llama_cpp.architectures import ROUTER, gguf_place
from amoeba_export.llama_cpp.quantizer import quantize_rows
from amoeba_export.reserved_file import ReservedFile

MODEL_NAME = "model.gguf"

QUANTIZATIONS = {
    "fp32": (gguf.GGMLQuantizationType.F32, gguf.LlamaFileType.ALL_F32),
    "fp16": (gguf.GGMLQuantizationType.F16, gguf.LlamaFileType.MOSTLY_F16),
    "bf16": (gguf.GGMLQuantizationType.BF16, gguf.LlamaFileType.MOSTLY_BF16),
    "int8": (gguf.GGMLQuantizationType.Q8_0, gguf.LlamaFileType.MOSTLY_Q8_0),
    "q6_k": (K_QUANTS["q6_k"], gguf.LlamaFileType.MOSTLY_Q6_K),
    "q5_k_m": (K_QUANTS["q5_k_m"], gguf.LlamaFileType.MOSTLY_Q5_K_M),
    "q4_k_m": (K_QUANTS["q4_k_m"], gguf.LlamaFileType.MOSTLY_Q4_K_M),
    "int4": (gguf.GGMLQuantizationType.Q4_0, gguf.LlamaFileType.MOSTLY_Q4_0),
}
"""`--dtype` -> type of matrices, and what the file says it mostly is. Norms and biases are F32."""

_ROWS_BYTES = 32 << 20
"""About how much of a matrix, as fp32, is converted at once."""


class GgufWriter:
    """A file whose header is written first, and weights that may come in any order."""

    def __init__(self, subnet: Subnet, folder: Path, *, dtype: str, rounded: RoundedSource | None = None) -> None:
        dense = subnet.architecture
        self._subnet = subnet
        self._dtype = dtype
        self._architecture = choose_architecture(dense)
        self._awaited = Awaited({spec.name: spec.shape for spec in subnet.specs}, folder)
        self._rounded_before = rounded
        names = () if rounded is not None else tuple(self._awaited)  # those were scaled before they were rounded
        self._equalizer = equalizer(names, subnet.family, dtype, norm_offset=dense.base.norm_offset)
        self._layers = written_layers(dense, self._architecture, quantized=DTYPES[dtype].is_quantized)
        self._q_factor = q_factor(self._architecture, dense)
        self._vectors: dict[str, torch.Tensor] = {}  # biases, which may be sums of two weights; written last
        path = folder / MODEL_NAME
        name = f"{subnet.model_name} {subnet.plan.shape}"
        placed = lay_out(
            path, dense, dtype=dtype, name=name, add_vocabulary=lambda header: add_tokenizer(header, subnet)
        )
        self._tensors, self._data_start = placed.tensors, placed.data_start
        self._file = ReservedFile(path, placed.size_bytes)
        self._file.write(placed.header, 0)
        for tensor, factors in rope_factors(dense).items():
            self._write_rows(tensor, factors)

    def accept(self, name: str, weight: torch.Tensor) -> None:
        """See `Writer`.

        Raises:
            WeightsMismatch: A weight that is unknown, given twice, or of another shape.
            NotRepresentable: 16-bit floats cannot hold its values.
        """
        self._awaited.given(name, weight)
        if self._rounded_before is not None and name in self._rounded_before.names():
            packed = self._rounded_before.packed(name)
            weight = self._rounded_before.read(name) if packed is None else packed
        for ready, values in self._equalizer.take(name, weight):
            self._place(ready, values)

    def _place(self, name: str, weight: torch.Tensor) -> None:
        """Write a matrix; keep a vector for `close`."""
        dense, place = self._subnet.architecture, self._subnet.family.place(name)
        target = gguf_place(self._architecture, place.role, place.layer, place.part)
        tensor = target.tensor
        if place.layer is not None:
            weight = self._as_llama_cpp_has_it(weight, place.role, dense.layers[place.layer])
        if self._is_norm(place.role) and dense.base.norm_offset:
            weight = weight.to(torch.float32) + dense.base.norm_offset
        if place.role == self._scaled_role and self._q_factor != 1.0:
            weight = weight.to(torch.float32) * self._q_factor
        if tensor not in self._tensors:  # the constant of a removed attention block
            assert place.role == "o" and place.part == "bias" and place.layer, name
            tensor = gguf_place(self._architecture, "down", place.layer - 1, "bias").tensor
        if weight.dim() == 1:
            present = self._vectors.get(tensor)
            value = weight.to(torch.float32)
            self._vectors[tensor] = value if present is None else present + value
        else:
            before = target.roles[: target.roles.index(place.role)]
            first = sum(self._rows_of(role, place.layer) for role in before)
            self._write_rows(tensor, weight, first_row=first)

    def _as_llama_cpp_has_it(self, weight: torch.Tensor, role: Role, dims: LayerDims) -> torch.Tensor:
        """Rows of q and k as RoPE wants them, and `down` of experts one after the other."""
        if role == "down" and self._subnet.architecture.base.expert_size:
            return expert_after_expert(weight, dims.ffn_size)
        heads = {"q": dims.num_heads, "k": dims.num_kv_heads}
        return permute_pairs(weight, heads[role]) if self._architecture.in_pairs and role in heads else weight

    def _rows_of(self, role: str, layer: int | None) -> int:
        """Rows of a role's weight in the file."""
        assert layer is not None
        base, dims = self._subnet.architecture.base, self._layers[layer]
        heads = {"q": dims.num_heads, "k": dims.num_kv_heads, "v": dims.num_kv_heads}
        return heads[role] * base.head_dim if role in heads else dims.ffn_size

    def _is_norm(self, role: Role) -> bool:
        return role.endswith("_norm")

    @property
    def _scaled_role(self) -> Role:
        """What scores grow with: the norm of q, or q itself."""
        return "q_norm" if self._subnet.architecture.base.qk_norm else "q"

    def _write_rows(self, name: str, weight: torch.Tensor, *, first_row: int = 0) -> None:
        """Convert and write some rows at a time. Rows and columns beyond those of `weight` stay zero."""
        shape, kind, position = self._tensors[name]
        if weight.dim() == 1:
            self._file.write(weight.to(torch.float32).numpy().tobytes(), self._data_start + position)
            return
        row_bytes = tensor_bytes(shape[-1:], kind)
        step = max(_ROWS_BYTES // (4 * shape[-1]), 1)
        for start in range(0, weight.shape[0], step):
            if weight.dtype is torch.uint8:  # bytes of the type already
                offset = self._data_start + position + (first_row + start) * row_bytes
                self._file.write(weight[start : start + step].contiguous().numpy().reshape(-1).data, offset)
                continue
            rows = weight[start : start + step].to(torch.float32)
            if rows.shape[1] < shape[-1]:
                rows = torch.nn.functional.pad(rows, (0, shape[-1] - rows.shape[1]))
            with np.errstate(over="ignore"):  # found below, by name
                data = self._rounded(rows.contiguous().numpy(), kind)
            if data.dtype == np.float16 and not np.isfinite(data).all():
                raise NotRepresentable.in_fp16(name)
            offset = self._data_start + position + (first_row + start) * row_bytes
            self._file.write(np.ascontiguousarray(data).view(np.uint8).reshape(-1).data, offset)

    def _rounded(self, rows: npt.NDArray[np.float32], kind: gguf.GGMLQuantizationType) -> npt.NDArray[Any]:
        """By llama.cpp itself where a mixture of its own is written."""
        if self._dtype in K_QUANTS and kind is not gguf.GGMLQuantizationType.F16:
            return quantize_rows(rows, int(kind), gguf.GGML_QUANT_SIZES[kind])
        if kind is gguf.GGMLQuantizationType.Q4_0:
            return quantize_q4_0(rows)
        rounded: npt.NDArray[Any] = gguf.quantize(rows, kind)
        return rounded

    def close(self) -> None:
        """See `Writer`. Raises `WeightsMismatch` when a weight was not given."""
        for name, vector in self._vectors.items():
            self._write_rows(name, vector)
        self._file.close()
        self._awaited.check_complete()


@dataclass(frozen=True, slots=True, kw_only=True)
class FileLayout:
    """A file before its weights.

    Attributes:
        header: Everything before the data.
        tensors: Shape, type, and place after `data_start`, of every tensor.
    """

    header: bytes
    tensors: Mapping[str, tuple[tuple[int, ...], gguf.GGMLQuantizationType, int]]
    data_start: int
    size_bytes: int


def lay_out(
    path: Path, dense: DenseArchitecture, *, dtype: str, name: str, add_vocabulary: Callable[[gguf.GGUFWriter], None]
) -> FileLayout:
    """The header of a file for `dense`, and the place of each tensor. `path` is written and removed again."""
    architecture = choose_architecture(dense)
    layers = written_layers(dense, architecture, quantized=DTYPES[dtype].is_quantized)
    header = gguf.GGUFWriter(path, architecture.name)
    add_hyperparameters(header, dense, architecture, layers, name=name, file_type=QUANTIZATIONS[dtype][1])
    add_vocabulary(header)
    tensors: dict[str, tuple[tuple[int, ...], gguf.GGMLQuantizationType, int]] = {}
    position = 0
    for tensor, shape in expected_tensors(dense, architecture, layers):
        kind = tensor_type(dtype, tensor, shape, layers, tied=dense.base.tied_embeddings)
        size = tensor_bytes(shape, kind)
        header.add_tensor_info(tensor, shape, np.dtype(np.float32), size, raw_dtype=kind)
        tensors[tensor] = (shape, kind, position)
        position += gguf.GGUFWriter.ggml_pad(size, header.data_alignment)
    data_start = _write_header(header)
    content = path.read_bytes()
    path.unlink()
    return FileLayout(header=content, tensors=tensors, data_start=data_start, size_bytes=data_start + position)


def tensor_type(
    dtype: str, name: str, shape: tuple[int, ...], layers: tuple[LayerDims, ...], *, tied: bool
) -> gguf.GGMLQuantizationType:
    """How a tensor is stored. Embeddings and output stay at 8 bits: at 4, a small model is ruined by them."""
    if len(shape) == 1 or f".{ROUTER}." in name:
        return gguf.GGMLQuantizationType.F32
    if dtype in K_QUANTS:
        return k_quant_type(dtype, name, shape[-1], layers, tied=tied)
    if DTYPES[dtype].is_quantized:
        if shape[-1] % BLOCK:
            return gguf.GGMLQuantizationType.F16
        if name in ("token_embd.weight", "output.weight"):
            return gguf.GGMLQuantizationType.Q8_0
    return QUANTIZATIONS[dtype][0]


def tensor_bytes(shape: tuple[int, ...], kind: gguf.GGMLQuantizationType) -> int:
    """What a tensor of whole blocks occupies."""
    block: int
    size: int
    block, size = gguf.GGML_QUANT_SIZES[kind]
    return math.prod(shape) // block * size


def _write_header(header: gguf.GGUFWriter) -> int:
    """Write everything before the data and return where the data starts."""
    header.write_header_to_file()
    header.write_kv_data_to_file()
    header.write_ti_data_to_file()
    assert header.fout is not None
    end: int = header.fout[0].tell()
    header.close()
    return int(gguf.GGUFWriter.ggml_pad(end, header.data_alignment))
