"""W4A16: weights of layers in 4 bits, packed as the `compressed-tensors` package packs them, for vLLM and Edge-LLM.

A matrix [O, I] becomes `weight_packed` [O, I / 8] in int32, the first of eight values in the lowest bits and each with
8 added; `weight_scale` [O, I / G]; `weight_shape`; and without symmetry `weight_zero_point` [O / 8, I / G], packed down
the rows. A value is scale * (integer - zero point). Embedding and lm_head stay as they are: both runtimes want that.

Legend: O out, I in, G group.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch

from amoeba_export.errors import NotRepresentable
from amoeba_export.formats.awaited import Awaited
from amoeba_export.formats.equalize import Equalizer
from amoeba_export.formats.grid import MOST, TOLERANCE, offset_grids, symmetric_grids
from amoeba_export.ir import DenseArchitecture, TensorSource, TensorSpec, Writer

GROUPS = (128, 64, 32)
"""Values that share a scale: the largest that divides every row. vLLM's kernels have these."""

_PER_WORD = 8


@dataclass(frozen=True, slots=True)
class Scheme:
    """One way to pack."""

    symmetric: bool


SCHEMES: Mapping[str, Scheme] = MappingProxyType(
    {"w4a16": Scheme(symmetric=True), "w4a16-asym": Scheme(symmetric=False)}
)
"""By `--dtype`."""


@dataclass(frozen=True, slots=True)
class Rounded:
    """Integers -8 to 7 [O, I], scales [O, I / G] of either sign, and zero points -8 to 7 [O, I / G] or None."""

    integers_OI: torch.Tensor
    scales_OB: torch.Tensor
    zeros_OB: torch.Tensor | None


Round = Callable[[str, torch.Tensor, int, Scheme], Rounded]
"""How a weight is rounded: from its name, its values [O, I] in fp32, the group and the scheme."""


def group_size(dense: DenseArchitecture) -> int:
    """Of all matrices. Raises `NotRepresentable` when no group divides the rows of every one."""
    widths = _row_widths(dense)
    if (group := _dividing(widths)) is not None:
        return group
    odd = sorted(width for width in widths if width % GROUPS[-1])
    raise NotRepresentable(
        "safetensors",
        f"W4A16 packs rows of whole groups of {GROUPS[-1]}, and some are of {', '.join(map(str, odd))}",
        (f"a target with align = {GROUPS[-1]}", "--dtype bf16", "--format gguf --dtype int4"),
    )


def nearest_group(dense: DenseArchitecture) -> int:
    """As `group_size`; the smallest where none divides: what dims cost can be told of any."""
    return _dividing(_row_widths(dense)) or GROUPS[-1]


def _row_widths(dense: DenseArchitecture) -> set[int]:
    base = dense.base
    return {base.hidden_size}.union(*({one.num_heads * base.head_dim, one.ffn_size} for one in dense.layers))


def _dividing(widths: Collection[int]) -> int | None:
    return next((group for group in GROUPS if all(width % group == 0 for width in widths)), None)


def parts_of(spec: TensorSpec, group: int, scheme: Scheme, scale_dtype: torch.dtype) -> tuple[TensorSpec, ...]:
    """The tensors that a matrix becomes."""
    module = spec.name.removesuffix(".weight")
    rows, columns = spec.shape
    parts = [
        TensorSpec(name=f"{module}.weight_packed", shape=(rows, -(-columns // _PER_WORD)), dtype=torch.int32),
        TensorSpec(name=f"{module}.weight_scale", shape=(rows, -(-columns // group)), dtype=scale_dtype),
        TensorSpec(name=f"{module}.weight_shape", shape=(2,), dtype=torch.int64),
    ]
    if not scheme.symmetric:
        shape = (-(-rows // _PER_WORD), -(-columns // group))
        parts.append(TensorSpec(name=f"{module}.weight_zero_point", shape=shape, dtype=torch.int32))
    return tuple(parts)


def round_to_nearest(name: str, w_OI: torch.Tensor, group: int, scheme: Scheme) -> Rounded:
    """Steps that just hold the largest value of a group, in bf16. A group on a grid of the scheme keeps it."""
    groups_OBG = w_OI.reshape(len(w_OI), -1, group)
    fits_OB, kept_OB = _grids(groups_OBG, scheme)
    if scheme.symmetric:
        # The value that is furthest from zero becomes -8, for which a scale may be negative: no level is unused.
        low_OB, high_OB = groups_OBG.amin(-1), groups_OBG.amax(-1)
        furthest_OB = torch.where(high_OB > -low_OB, high_OB, low_OB)
        scales_OB = torch.where(fits_OB, kept_OB, _in_bf16(furthest_OB / -8))
        zeros_OB = None
    else:
        low_OB, high_OB = groups_OBG.amin(-1).clamp(max=0), groups_OBG.amax(-1).clamp(min=0)
        scales_OB = torch.where(fits_OB, kept_OB, _in_bf16((high_OB - low_OB) / 15))
        low_OB = torch.where(fits_OB, groups_OBG.amin(-1), low_OB)
        zeros_OB = (-8 - low_OB / _divisor(scales_OB)).round().clamp(-8, 7)
    integers_OBG = groups_OBG / _divisor(scales_OB)[..., None]
    if zeros_OB is not None:
        integers_OBG = integers_OBG + zeros_OB[..., None]
    integers_OI = integers_OBG.round().clamp(-8, 7).reshape(w_OI.shape)
    return Rounded(integers_OI, scales_OB, zeros_OB)


def is_rounded(w_OI: torch.Tensor, group: int, scheme: Scheme) -> bool:
    """Whether most groups of a matrix lie on grids of the scheme."""
    fits_OB, _ = _grids(w_OI.float().reshape(len(w_OI), -1, group), scheme)
    return bool(fits_OB.float().mean() >= MOST)


def _grids(groups_OBG: torch.Tensor, scheme: Scheme) -> tuple[torch.Tensor, torch.Tensor]:
    """Which groups lie on a grid of the scheme, and its step in bf16."""
    find = symmetric_grids if scheme.symmetric else offset_grids
    grids = find(groups_OBG.numpy(), 4)
    fits_OB, steps_OB = torch.from_numpy(grids.fits), torch.from_numpy(grids.steps).to(torch.bfloat16).float()
    fits_OB = fits_OB & groups_OBG.any(-1)
    if not scheme.symmetric:  # a level is zero
        zeros_OB = groups_OBG.amin(-1) / -_divisor(steps_OB)
        whole_OB = zeros_OB.round()
        fits_OB = fits_OB & ((zeros_OB - whole_OB).abs() <= TOLERANCE) & (whole_OB >= 0) & (whole_OB <= 15)
    return fits_OB, steps_OB


def _in_bf16(scales: torch.Tensor) -> torch.Tensor:
    """The nearest that is no smaller: a smaller one would clip the largest value."""
    nearest = scales.to(torch.bfloat16).float()
    larger = (nearest * (1 + 2.0**-7)).to(torch.bfloat16).float()
    return torch.where(nearest.abs() < scales.abs(), larger, nearest)


def _divisor(scales: torch.Tensor) -> torch.Tensor:
    return torch.where(scales == 0, 1.0, scales)


def pack(rounded: Rounded) -> dict[str, torch.Tensor]:
    """The parts of a matrix by what follows the module's name."""
    parts = {
        "weight_packed": _packed(rounded.integers_OI),
        "weight_scale": rounded.scales_OB,
        "weight_shape": torch.tensor(rounded.integers_OI.shape, dtype=torch.int64),
    }
    if rounded.zeros_OB is not None:
        parts["weight_zero_point"] = _packed(rounded.zeros_OB.T).T.contiguous()
    return parts


def _packed(integers_OI: torch.Tensor) -> torch.Tensor:
    """Eight to a word, the last word of a row filled up with zeros."""
    nibbles = (integers_OI + 8).to(torch.uint8)
    nibbles = torch.nn.functional.pad(nibbles, (0, -nibbles.shape[1] % _PER_WORD))
    pairs = nibbles[:, 0::2] | (nibbles[:, 1::2] << 4)
    words = np.frombuffer(pairs.numpy().tobytes(), dtype="<i4").reshape(len(pairs), -1)
    return torch.from_numpy(words.copy())


def quantization_config(group: int, scheme: Scheme, *, head: str) -> dict[str, Any]:
    """What `config.json` says of it, as the `compressed-tensors` package reads it. `head` names what is not packed."""
    weights = {
        "num_bits": 4,
        "type": "int",
        "symmetric": scheme.symmetric,
        "strategy": "group",
        "group_size": group,
        "dynamic": False,
    }
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": weights,
                "input_activations": None,
                "output_activations": None,
            }
        },
        "ignore": [head],
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }


class PackedWriter:
    """Takes the weights of a cut model, makes channels alike, and gives their parts to another writer.

    Args:
        inner: Who writes the parts.
        specs: The weights that will come.
        packed: Which of them are packed.
        equalizer: Makes channels alike.
        round_weight: How they are rounded, by name and values.
        rounded: Weights that are written in place of those given, scaled and on grids already.
        folder: Where errors say it is.
    """

    def __init__(
        self,
        inner: Writer,
        specs: Sequence[TensorSpec],
        packed: Collection[str],
        *,
        equalizer: Equalizer,
        round_weight: Callable[[str, torch.Tensor], Rounded],
        rounded: TensorSource | None = None,
        folder: Path,
    ) -> None:
        self._inner, self._packed = inner, packed
        self._round, self._rounded = round_weight, rounded
        self._awaited = Awaited({spec.name: spec.shape for spec in specs}, folder)
        self._equalizer = equalizer

    def accept(self, name: str, weight: torch.Tensor) -> None:
        """See `Writer`. Raises `WeightsMismatch` for a weight that is unknown, given twice, or of another shape."""
        self._awaited.given(name, weight)
        if self._rounded is not None and name in self._rounded.names():
            weight = self._rounded.read(name)
        for ready, values in self._equalizer.take(name, weight):
            if ready not in self._packed:
                self._inner.accept(ready, values)
                continue
            rounded = self._round(ready, values.float())
            for part, tensor in pack(rounded).items():
                self._inner.accept(f"{ready.removesuffix('.weight')}.{part}", tensor)

    def close(self) -> None:
        """See `Writer`. Raises `WeightsMismatch` when a weight was not given."""
        try:
            self._inner.close()
        finally:  # one that is missing holds up all that are scaled with it: it is named, and not their parts
            self._awaited.check_complete()
