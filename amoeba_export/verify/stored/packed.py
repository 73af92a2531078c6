"""Weights that `compressed-tensors` packs, read back: W4A16's parts in a safetensors folder.

What writes them is not asked. Eight integers lie in a word of 32 bits, the first in the lowest bits, 8 added to each; a
value is scale * (integer - zero point).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch

from amoeba_export.verify.stored.tensor import Searched, Stored

_PARTS = ("weight_packed", "weight_scale", "weight_shape", "weight_zero_point")
_SHIFTS = torch.arange(0, 32, 4)
_LEVELS = 16


def part_names(name: str) -> dict[str, str]:
    """The parts that the weight `name` would have."""
    module = name.removesuffix(".weight")
    return {part: f"{module}.{part}" for part in _PARTS}


def weight_names(names: Iterable[str]) -> list[str]:
    """`names` with the parts of each packed weight as one."""
    found: dict[str, None] = {}
    for name in names:
        module, _, part = name.rpartition(".")
        found[f"{module}.weight" if part in _PARTS else name] = None
    return list(found)


def unpack(parts: Mapping[str, torch.Tensor]) -> Stored:
    """The weight that parts stand for. Raises `ValueError` when they do not fit together."""
    missing = [part for part in _PARTS[:3] if part not in parts]
    if missing:
        raise ValueError(f"it has no {missing[0]}")
    words, scales = parts["weight_packed"], parts["weight_scale"]
    shape = [int(size) for size in parts["weight_shape"].reshape(-1)]
    if words.dtype is not torch.int32 or words.dim() != 2 or not scales.is_floating_point() or len(shape) != 2:
        raise ValueError(f"its words are {words.dtype} of shape {list(words.shape)}, its own shape {shape}")
    rows, columns = shape
    blocks = scales.shape[1] if scales.dim() == 2 else 0
    if words.shape != (rows, -(-columns // 8)) or len(scales) != rows or not blocks or columns % blocks:
        raise ValueError(f"{list(words.shape)} words and {list(scales.shape)} scales do not make {shape}")
    integers_OI = _integers(words)[:, :columns]
    scales_OB, group = scales.float(), columns // blocks
    zeros = parts.get("weight_zero_point")
    if zeros is None:
        values = integers_OI * scales_OB.repeat_interleave(group, dim=1)
        return Stored(values=values, dtype="w4a16", steps=scales_OB, block=group, half_steps=True)
    if zeros.dtype is not torch.int32 or zeros.shape != (-(-rows // 8), blocks):
        raise ValueError(f"its zero points are {zeros.dtype} of shape {list(zeros.shape)}")
    zeros_OB = _integers(zeros.T.contiguous())[:, :rows].T
    values = (integers_OI - zeros_OB.repeat_interleave(group, dim=1)) * scales_OB.repeat_interleave(group, dim=1)
    nothing = torch.zeros_like(scales_OB)
    searched = Searched(
        levels=_LEVELS, steps=scales_OB, offsets=scales_OB * (zeros_OB + 8), unit=nothing, offset_unit=nothing
    )
    return Stored(values=values, dtype="w4a16-asym", block=group, half_steps=True, searched=searched)


def _integers(words: torch.Tensor) -> torch.Tensor:
    """-8 to 7, eight of a word."""
    return ((words[..., None] >> _SHIFTS) & 15).flatten(1).float() - 8
