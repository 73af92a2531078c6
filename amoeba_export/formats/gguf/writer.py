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

from amoeba_export.errors import NotRepresentable, WeightsMismatch
from amoeba_export.formats.equalize import Equalizer, is_equalized
from amoeba_export.formats.gguf.k_quants import K_QUANTS, k_quant_type
from amoeba_export.formats.gguf.layout import (
    ARCHITECTURES,
    BLOCK,
    choose_architecture,
    expected_tensors,
    permute_pairs,
    rope_factors,
    written_layers,
    yarn_magnitude,
)
from amoeba_export.formats.gguf.tokenizer import add_tokenizer
from amoeba_export.formats.reserved import ReservedFile
from amoeba_export.ir import Architecture, DenseArchitecture, LayerDims, Subnet
from amoeba_export.ir.dtype import DTYPES
from amoeba_export.llama_cpp.quantizer import quantize_rows

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

    def __init__(self, subnet: Subnet, folder: Path, *, dtype: str) -> None:
        dense = subnet.architecture
        self._subnet = subnet
        self._dtype = dtype
        self._folder = folder
        self._architecture = choose_architecture(dense)
        self._missing = {spec.name: spec.shape for spec in subnet.specs}
        self._equalizer = Equalizer(self._missing if is_equalized(dtype) else ())
        self._names = gguf.get_tensor_name_map(ARCHITECTURES[self._architecture], len(dense.layers))
        self._vectors: dict[str, torch.Tensor] = {}  # biases, which may be sums of two weights; written last
        path = folder / MODEL_NAME
        name = f"{subnet.model_name} {subnet.plan.shape}"
        placed = lay_out(
            path, dense, dtype=dtype, name=name, add_vocabulary=lambda header: add_tokenizer(header, subnet)
        )
        self._tensors, self._data_start = placed.tensors, placed.data_start
        self._file = ReservedFile(path, placed.size_bytes)
        self._file.write(placed.header, 0)
        factors = rope_factors(dense)
        if factors is not None:
            self._write_rows("rope_freqs.weight", factors)

    def accept(self, name: str, weight: torch.Tensor) -> None:
        """See `Writer`.

        Raises:
            WeightsMismatch: A weight that is unknown, given twice, or of another shape.
            NotRepresentable: 16-bit floats cannot hold its values.
        """
        expected = self._missing.get(name)
        if expected != tuple(weight.shape):
            known = any(spec.name == name for spec in self._subnet.specs)
            problem = "was given twice" if known and expected is None else "is not part of this model"
            if expected is not None:
                problem = f"is {list(weight.shape)}, not {list(expected)}"
            raise WeightsMismatch([f"{name} {problem}"], where=self._folder)
        del self._missing[name]
        for ready, values in self._equalizer.take(name, weight):
            self._place(ready, values)

    def _place(self, name: str, weight: torch.Tensor) -> None:
        """Write a matrix; keep a vector for `close`."""
        target = str(self._names.get_name(name, try_suffixes=(".weight", ".bias")))
        idx = int(target.split(".")[1]) if target.startswith("blk.") else -1
        if self._architecture in ("llama", "deci") and ".attn_q." in target:
            weight = permute_pairs(weight, self._subnet.architecture.layers[idx].num_heads)
        if self._architecture in ("llama", "deci") and ".attn_k." in target:
            weight = permute_pairs(weight, self._subnet.architecture.layers[idx].num_kv_heads)
        if target not in self._tensors:  # the constant of a removed attention block
            assert target == f"blk.{idx}.attn_output.bias", target
            target = f"blk.{idx - 1}.ffn_down.bias"
        if weight.dim() == 1:
            present = self._vectors.get(target)
            value = weight.to(torch.float32)
            self._vectors[target] = value if present is None else present + value
        else:
            self._write_rows(target, weight)

    def _write_rows(self, name: str, weight: torch.Tensor) -> None:
        """Convert and write some rows at a time. Rows and columns beyond those of `weight` stay zero."""
        shape, kind, position = self._tensors[name]
        if weight.dim() == 1:
            self._file.write(weight.to(torch.float32).numpy().tobytes(), self._data_start + position)
            return
        row_bytes = tensor_bytes(shape[1:], kind)
        step = max(_ROWS_BYTES // (4 * shape[1]), 1)
        for start in range(0, weight.shape[0], step):
            rows = weight[start : start + step].to(torch.float32)
            if rows.shape[1] < shape[1]:
                rows = torch.nn.functional.pad(rows, (0, shape[1] - rows.shape[1]))
            with np.errstate(over="ignore"):  # found below, by name
                data = self._rounded(rows.contiguous().numpy(), kind)
            if data.dtype == np.float16 and not np.isfinite(data).all():
                raise NotRepresentable("fp16", f"values of {name} exceed its range", ("--dtype bf16", "--dtype fp32"))
            offset = self._data_start + position + start * row_bytes
            self._file.write(np.ascontiguousarray(data).view(np.uint8).reshape(-1).data, offset)

    def _rounded(self, rows: npt.NDArray[np.float32], kind: gguf.GGMLQuantizationType) -> npt.NDArray[Any]:
        """By llama.cpp itself where a mixture of its own is written."""
        if self._dtype in K_QUANTS and kind is not gguf.GGMLQuantizationType.F16:
            return quantize_rows(rows, int(kind), gguf.GGML_QUANT_SIZES[kind])
        rounded: npt.NDArray[Any] = gguf.quantize(rows, kind)
        return rounded

    def close(self) -> None:
        """See `Writer`. Raises `WeightsMismatch` when a weight was not given."""
        for name, vector in self._vectors.items():
            self._write_rows(name, vector)
        self._file.close()
        if self._missing:
            raise WeightsMismatch([f"{name} is missing" for name in self._missing], where=self._folder)


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
    header = gguf.GGUFWriter(path, architecture)
    _add_hyperparameters(header, dense.base, layers, name, QUANTIZATIONS[dtype][1])
    add_vocabulary(header)
    tensors: dict[str, tuple[tuple[int, ...], gguf.GGMLQuantizationType, int]] = {}
    position = 0
    for tensor, shape in expected_tensors(dense, layers):
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
    if len(shape) == 1:
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


def _add_hyperparameters(
    header: gguf.GGUFWriter,
    base: Architecture,
    layers: tuple[LayerDims, ...],
    name: str,
    file_type: gguf.LlamaFileType,
) -> None:
    header.add_type(gguf.GGUFType.MODEL)
    header.add_name(name)
    header.add_file_type(file_type)
    header.add_quantization_version(gguf.GGML_QUANT_VERSION)
    header.add_vocab_size(base.vocab_size)
    header.add_context_length(base.max_positions)
    header.add_embedding_length(base.hidden_size)
    header.add_block_count(len(layers))
    # One number where all layers agree: older readers of `llama` know no arrays.
    header.add_feed_forward_length(_one_or_all([dims.ffn_size for dims in layers]))
    header.add_head_count(_one_or_all([dims.num_heads for dims in layers]))
    header.add_head_count_kv(_one_or_all([dims.num_kv_heads for dims in layers]))
    header.add_key_length(base.head_dim)
    header.add_value_length(base.head_dim)
    header.add_layer_norm_rms_eps(base.norm_eps)
    header.add_rope_dimension_count(base.head_dim)
    header.add_rope_freq_base(base.rope_theta)
    scaling = base.rope_scaling or {}
    if scaling.get("rope_type") == "linear":
        header.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        header.add_rope_scaling_factor(scaling["factor"])
    if scaling.get("rope_type") == "yarn":
        header.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        header.add_rope_scaling_factor(scaling["factor"])
        header.add_rope_scaling_orig_ctx_len(scaling.get("original_max_position_embeddings", base.max_positions))
        if (magnitude := yarn_magnitude(scaling)) != 1.0:
            header.add_float32(gguf.Keys.Rope.SCALING_ATTN_FACTOR.format(arch=header.arch), magnitude)


def _one_or_all(values: list[int]) -> int | list[int]:
    return values[0] if len(set(values)) == 1 else values
