"""Tensors of `model.gguf`.

llama.cpp's `llama` and `deci` rotate neighbouring pairs, so rows of q and k lie in another order; rows of integers are
filled up with zeros to whole blocks; and `deci` wants an FFN everywhere, and the constant that a removed attention left
in the FFN bias before it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Mapping
from pathlib import Path

import gguf
import numpy as np
import torch

from amoeba_export.errors import DamagedFile
from amoeba_export.verify.stored.k_quants import BLOCKS, NAMES, scales_of
from amoeba_export.verify.stored.tensor import Searched, Shapes, Stored

_DTYPES = {
    gguf.GGMLQuantizationType.F32: "fp32",
    gguf.GGMLQuantizationType.F16: "fp16",
    gguf.GGMLQuantizationType.BF16: "bf16",
    gguf.GGMLQuantizationType.Q8_0: "int8",
    gguf.GGMLQuantizationType.Q4_0: "int4",
    **NAMES,
}
_BLOCK = 32
_ADDED = ("rope_freqs.weight",)
"""Tensors that are no weights of the model: they are part of RoPE, which is compared by its angles."""


class GgufWeights:
    """See `StoredWeights`."""

    def __init__(self, folder: Path, shapes: Shapes) -> None:
        self._path = folder / "model.gguf"
        self._shapes = shapes
        reader = gguf.GGUFReader(self._path)
        arch = str(reader.fields["general.architecture"].contents())
        kinds = {name: kind for kind, name in gguf.MODEL_ARCH_NAMES.items()}
        if arch not in kinds:
            raise DamagedFile(self._path, f"its architecture is {arch}")
        self._in_pairs = arch in ("llama", "deci")
        self._head_dim = int(reader.fields[f"{arch}.attention.key_length"].contents())
        by_target = {str(tensor.name): tensor for tensor in reader.tensors if tensor.name not in _ADDED}
        num_layers = 1 + max(
            (int(name.split(".")[2]) for name in shapes if name.startswith("model.layers.")), default=-1
        )
        targets = gguf.get_tensor_name_map(kinds[arch], num_layers)
        self._tensors: dict[str, gguf.ReaderTensor] = {}
        sums: dict[str, tuple[str, ...]] = {}
        for name in shapes:
            target = targets.get_name(name, try_suffixes=(".weight", ".bias"))
            if target in by_target:
                self._tensors[name] = by_target.pop(target)
            elif name.endswith("self_attn.o_proj.bias"):
                layer = int(name.split(".")[2])
                before = f"model.layers.{layer - 1}.mlp.down_proj.bias"
                sums[before] = (*(part for part in (before,) if part in shapes), name)
        for before in sums:
            target = targets.get_name(before, try_suffixes=(".weight", ".bias"))
            if before not in self._tensors and target in by_target:
                self._tensors[before] = by_target.pop(target)
        self.sums: Mapping[str, tuple[str, ...]] = sums
        self._check_counts(reader, arch)
        self._left = by_target

    def _check_counts(self, reader: gguf.GGUFReader, arch: str) -> None:
        """llama.cpp splits rows into heads as the header counts them."""
        rows = {str(tensor.name): int(tensor.shape[-1]) for tensor in reader.tensors}
        for key, tensor, size in (
            ("attention.head_count", "attn_q", self._head_dim),
            ("attention.head_count_kv", "attn_k", self._head_dim),
            ("feed_forward_length", "ffn_gate", 1),
        ):
            counts = reader.fields[f"{arch}.{key}"].contents()
            for layer in range(int(reader.fields[f"{arch}.block_count"].contents())):
                count = counts[layer] if isinstance(counts, list) else counts
                if rows.get(f"blk.{layer}.{tensor}.weight", 0) != count * size:
                    raise DamagedFile(self._path, f"its {key} is {count} in layer {layer}, and {tensor} has other rows")

    def names(self) -> Collection[str]:
        """See `StoredWeights`. A tensor that stands for no weight of the plan goes by its own name."""
        return [*self._tensors, *self._left]

    def read(self, name: str) -> Stored:
        """See `StoredWeights`."""
        tensor = self._tensors.get(name) or self._left[name]
        kind = gguf.GGMLQuantizationType(tensor.tensor_type)
        if kind not in _DTYPES:
            raise DamagedFile(self._path, f"{tensor.name} is of type {kind.name}")
        shape = tuple(int(size) for size in reversed(tensor.shape))
        values = torch.from_numpy(gguf.dequantize(tensor.data, kind).copy()).reshape(shape)
        searched = scales_of(kind, tensor.data, shape[0]) if kind in NAMES else None
        steps = (
            _steps(tensor, shape) if kind in (gguf.GGMLQuantizationType.Q8_0, gguf.GGMLQuantizationType.Q4_0) else None
        )
        if self._in_pairs and (".self_attn.q_proj." in name or ".self_attn.k_proj." in name):
            values = self._halves(values)
            steps = None if steps is None else self._halves(steps)
            searched = None if searched is None else _each(searched, self._halves)
        if (expected := self._shapes.get(name)) is not None:
            values, steps = self._cut(name, values, steps, expected, has_offsets=kind is gguf.GGMLQuantizationType.Q5_1)
            searched = None if searched is None else _each(searched, lambda part: part[: expected[0]])
        block = BLOCKS.get(kind, _BLOCK)
        return Stored(values=values, dtype=_DTYPES[kind], steps=steps, block=block, half_steps=True, searched=searched)

    def _cut(
        self,
        name: str,
        values: torch.Tensor,
        steps: torch.Tensor | None,
        expected: tuple[int, ...],
        *,
        has_offsets: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The plan's part of a tensor. What lies beyond must be zero.

        Integers with offsets have no zero. Their columns beyond are multiplied with neurons whose own weights are.
        """
        shape = tuple(values.shape)
        if len(shape) != len(expected) or any(have < want for have, want in zip(shape, expected, strict=True)):
            raise DamagedFile(self._path, f"{name} is {list(shape)}, and the plan keeps {list(expected)}")
        if has_offsets:
            values = values[:, : expected[1]]
        kept = values[tuple(slice(size) for size in expected)]
        if kept.numel() != values.numel() and int(values.count_nonzero()) != int(kept.count_nonzero()):
            raise DamagedFile(
                self._path, f"{name} is {list(shape)}, the plan keeps {list(expected)}, the rest is not zero"
            )
        return kept, None if steps is None else steps[: expected[0]]

    def _halves(self, w: torch.Tensor) -> torch.Tensor:
        """Rows of heads from neighbouring pairs to halves."""
        heads = w.reshape(-1, self._head_dim // 2, 2, *w.shape[1:])
        return heads.transpose(1, 2).reshape(w.shape)


def _each(scales: Searched, change: Callable[[torch.Tensor], torch.Tensor]) -> Searched:
    """`scales` with every one of them changed alike."""
    return dataclasses.replace(
        scales,
        steps=change(scales.steps),
        offsets=None if scales.offsets is None else change(scales.offsets),
        unit=change(scales.unit),
        offset_unit=change(scales.offset_unit),
    )


def _steps(tensor: gguf.ReaderTensor, shape: tuple[int, ...]) -> torch.Tensor:
    """Scales [rows, blocks]: the first two bytes of each block."""
    size = gguf.GGML_QUANT_SIZES[tensor.tensor_type][1]
    blocks = np.ascontiguousarray(tensor.data).reshape(-1).view(np.uint8).reshape(-1, size)
    scales = np.ascontiguousarray(blocks[:, :2]).view(np.float16).astype(np.float32)
    return torch.from_numpy(scales).reshape(shape[0], -1)
