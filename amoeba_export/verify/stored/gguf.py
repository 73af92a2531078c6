"""Tensors of `model.gguf`.

Where llama.cpp rotates neighbouring pairs, rows of q and k lie in another order; rows of integers are filled up with
zeros to whole blocks; `deci` wants an FFN everywhere, and the constant that a removed attention left in the FFN bias
before it; norms have 1 added where the family adds it, and q is scaled where llama.cpp does not scale scores so.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Collection, Mapping
from functools import partial
from pathlib import Path

import gguf
import numpy as np
import torch

from amoeba_export.errors import DamagedFile
from amoeba_export.llama_cpp.architectures import ARCHITECTURES, gguf_place, score_scale
from amoeba_export.verify.stored.k_quants import BLOCKS, NAMES, scales_of
from amoeba_export.verify.stored.tensor import Searched, Stored, Wanted

_DTYPES = {
    gguf.GGMLQuantizationType.F32: "fp32",
    gguf.GGMLQuantizationType.F16: "fp16",
    gguf.GGMLQuantizationType.BF16: "bf16",
    gguf.GGMLQuantizationType.Q8_0: "int8",
    gguf.GGMLQuantizationType.Q4_0: "int4",
    **NAMES,
}
_BLOCK = 32
_FFN = "feed_forward_length"
_ADDED = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")
"""Tensors that are no weights of the model: they are part of RoPE, which is compared by its angles."""


class GgufWeights:
    """See `StoredWeights`."""

    def __init__(self, folder: Path, wanted: Wanted) -> None:
        self._path = folder / "model.gguf"
        self._wanted = wanted
        reader = gguf.GGUFReader(self._path)
        arch = str(reader.fields["general.architecture"].contents())
        if arch not in ARCHITECTURES:
            raise DamagedFile(self._path, f"its architecture is {arch}")
        self._arch = ARCHITECTURES[arch]
        self._has_experts = "experts" in self._arch.always
        self._head_dim = int(reader.fields[f"{arch}.attention.key_length"].contents())
        self._sizes = [self._sizes_of(reader, layer) for layer in range(len(wanted.dense.layers))]
        by_name = {str(tensor.name): tensor for tensor in reader.tensors if tensor.name not in _ADDED}
        self._tensors: dict[str, gguf.ReaderTensor] = {}
        self._first_rows: dict[str, int] = {}
        sums: dict[str, tuple[str, ...]] = {}
        for name in wanted.shapes:
            if self._claim(name, by_name):
                continue
            place = wanted.family.place(name)
            if (place.role, place.part) == ("o", "bias") and place.layer:
                before = wanted.family.bias("down", place.layer - 1)
                sums[before] = (*(part for part in (before,) if part in wanted.shapes), name)
        for before in sums:
            self._claim(before, by_name)
        self.sums: Mapping[str, tuple[str, ...]] = sums
        self._check_counts(reader, arch)
        claimed = {str(tensor.name) for tensor in self._tensors.values()}
        self._left = {name: tensor for name, tensor in by_name.items() if name not in claimed}

    def _claim(self, name: str, by_name: Mapping[str, gguf.ReaderTensor]) -> bool:
        """Find the tensor that holds a weight, and the row that it begins at."""
        place = self._wanted.family.place(name)
        found = gguf_place(self._arch, place.role, place.layer, place.part)
        if found.tensor not in by_name:
            return False
        self._tensors[name] = by_name[found.tensor]
        if len(found.roles) > 1:
            assert place.layer is not None
            before = found.roles[: found.roles.index(place.role)]
            self._first_rows[name] = sum(self._sizes[place.layer][role] for role in before)
        return True

    def _sizes_of(self, reader: gguf.GGUFReader, layer: int) -> dict[str, int]:
        """Rows of the matrices of a layer, as the header counts them."""
        counts: dict[str, int] = {}
        for key, (roles, size) in self._counted().items():
            values = reader.fields[f"{self._arch.name}.{key}"].contents()
            count = values[layer] if isinstance(values, list) else values
            counts |= dict.fromkeys(roles, int(count) * size)
        return counts

    def _counted(self) -> Mapping[str, tuple[tuple[str, ...], int]]:
        """Key of the header -> roles whose rows (or experts, each of several rows) it counts, and rows of one."""
        ffn = ("expert_count", ("router", "gate", "up", "down")) if self._has_experts else (_FFN, ("gate", "up"))
        return {
            "attention.head_count": (("q",), self._head_dim),
            "attention.head_count_kv": (("k", "v"), self._head_dim),
            ffn[0]: (ffn[1], 1),
        }

    def _check_counts(self, reader: gguf.GGUFReader, arch: str) -> None:
        """llama.cpp splits rows into heads as the header counts them."""
        rows = {str(tensor.name): int(tensor.shape[-1]) for tensor in reader.tensors}
        num_layers = int(reader.fields[f"{arch}.block_count"].contents())
        if num_layers != len(self._sizes):
            raise DamagedFile(self._path, f"it has {num_layers} layers, and the plan keeps {len(self._sizes)}")
        for layer, sizes in enumerate(self._sizes):
            expected: dict[str, int] = {}
            for role, size in sizes.items():
                tensor = gguf_place(self._arch, role, layer, "weight").tensor
                expected[tensor] = expected.get(tensor, 0) + size
            for tensor, count in expected.items():
                if rows.get(tensor, 0) != count:
                    raise DamagedFile(self._path, f"its header counts {count} rows in {tensor}, which has others")

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
        rows = math.prod(shape[:-1])
        searched = scales_of(kind, tensor.data, rows) if kind in NAMES else None
        steps = (
            _steps(tensor, rows) if kind in (gguf.GGMLQuantizationType.Q8_0, gguf.GGMLQuantizationType.Q4_0) else None
        )
        place = self._wanted.family.find(name)
        role = None if place is None else place.role
        if len(shape) == 3:
            together = partial(_expert_beside_expert if role == "down" else _flat, num_experts=shape[0])
            values, steps = together(values), None if steps is None else together(steps)
            searched = None if searched is None else _each(searched, together)
        if name in self._first_rows:
            assert place is not None
            assert place.layer is not None
            first = self._first_rows[name]
            own = slice(first, first + self._sizes[place.layer][place.role])
            values, steps = values[own], None if steps is None else steps[own]
            searched = None if searched is None else _each(searched, lambda part: part[own])
        if self._arch.in_pairs and role in ("q", "k"):
            values = self._halves(values)
            steps = None if steps is None else self._halves(steps)
            searched = None if searched is None else _each(searched, self._halves)
        if (expected := self._wanted.shapes.get(name)) is not None:
            values, steps = self._cut(name, values, steps, expected, has_offsets=kind is gguf.GGMLQuantizationType.Q5_1)
            searched = None if searched is None else _each(searched, lambda part: part[: expected[0]])
        return Stored(
            values=values,
            dtype=_DTYPES[kind],
            steps=steps,
            block=BLOCKS.get(kind, _BLOCK),
            half_steps=True,
            searched=searched,
            offset=self._wanted.dense.base.norm_offset if role is not None and role.endswith("_norm") else 0.0,
            factor=self._factor(role),
        )

    def _factor(self, role: str | None) -> float:
        """What q is multiplied by, where llama.cpp scales scores otherwise than the model."""
        dense = self._wanted.dense
        base = dense.base
        if self._arch.large is None or role != ("q_norm" if base.qk_norm else "q"):
            return 1.0
        heads = dense.layers[0].num_heads
        return base.score_scale / score_scale(self._arch, len(dense.layers), base.hidden_size, heads, base.head_dim)

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


def _flat(w: torch.Tensor, num_experts: int) -> torch.Tensor:
    """Rows of one expert [E, O, I] (or flat already) under those of another."""
    return w.reshape(-1, w.shape[-1])


def _expert_beside_expert(w: torch.Tensor, num_experts: int) -> torch.Tensor:
    """Columns of one expert [E, O, I] (or flat already) beside those of another."""
    return torch.cat(w.reshape(-1, w.shape[-1]).chunk(num_experts), dim=1)


def _each(scales: Searched, change: Callable[[torch.Tensor], torch.Tensor]) -> Searched:
    """`scales` with every one of them changed alike."""
    return dataclasses.replace(
        scales,
        steps=change(scales.steps),
        offsets=None if scales.offsets is None else change(scales.offsets),
        unit=change(scales.unit),
        offset_unit=change(scales.offset_unit),
    )


def _steps(tensor: gguf.ReaderTensor, rows: int) -> torch.Tensor:
    """Scales [rows, blocks]: the first two bytes of each block."""
    size = gguf.GGML_QUANT_SIZES[tensor.tensor_type][1]
    blocks = np.ascontiguousarray(tensor.data).reshape(-1).view(np.uint8).reshape(-1, size)
    scales = np.ascontiguousarray(blocks[:, :2]).view(np.float16).astype(np.float32)
    return torch.from_numpy(scales).reshape(rows, -1)
