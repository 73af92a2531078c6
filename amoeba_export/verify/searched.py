"""Weights whose scales were searched for, as llama.cpp's K-quants: are they the expected ones?

The search is not repeated. Whatever it found, three things hold: a step and an offset are no larger than the values of
their block need; a value is rounded to the nearest one that they leave; and what is clipped is clipped by no more than
scales are rounded themselves, to a few bits of the largest one of a super-block.
"""

from __future__ import annotations

import torch

from amoeba_export.verify.numerics import HALF_ULP
from amoeba_export.verify.stored.tensor import Searched, Stored

_ROOM = 1.3
"""A search tries steps up to this much larger than the range of the values over the number of levels."""

_CLIPPED = 2.0
"""Steps by which it may clip the ends of that range."""

_SLACK = 1e-3
"""Of a step, for adding in another order."""

_EXACT = 1e-5
"""Of a step: integers times steps plus an offset, in another order."""

_TINY = 1e-12


def limits(found: Stored, wanted: torch.Tensor) -> tuple[torch.Tensor, str | None]:
    """How far each value may be from `wanted`, and what is wrong with the scales, if anything."""
    scales = found.searched
    assert scales is not None
    columns, size = wanted.shape[1], found.block
    padding = (0, scales.steps.shape[1] * size - columns)
    wanted_RBI, values_RBI = (
        torch.nn.functional.pad(one, padding).reshape(len(wanted), -1, size) for one in (wanted, found.values)
    )
    low_RB, high_RB = wanted_RBI.amin(-1), wanted_RBI.amax(-1)
    if scales.offsets is None:
        needed_RB = torch.maximum(-low_RB, high_RB) / (scales.levels // 2)
        deepest_RB = torch.zeros_like(needed_RB)
    else:
        needed_RB = (high_RB.clamp(min=0) - low_RB.clamp(max=0)) / (scales.levels - 1)
        deepest_RB = low_RB.abs() + 2 * needed_RB
    steps_RB = scales.steps.abs()
    # Steps of a block that is what it must be hide nothing.
    off_RB = ((values_RBI - wanted_RBI).abs() > (steps_RB * _EXACT + _TINY)[..., None]).any(-1)
    problem = None
    if bool((off_RB & (steps_RB > _ROOM * needed_RB + scales.unit / 2 + _TINY)).any()):
        problem = "has larger steps than its values need"
    elif scales.offsets is not None and bool(
        (off_RB & (scales.offsets.abs() > _ROOM * deepest_RB + scales.offset_unit / 2 + _TINY)).any()
    ):
        problem = "has larger offsets than its values need"
    elif bool((scales.unit > _largest(needed_RB, scales) * _ROOM + _TINY).any()):
        problem = "has coarser scales than its values need"
    elif bool((scales.offset_unit > _largest(deepest_RB, scales) * _ROOM + _TINY).any()):
        problem = "has coarser offsets than its values need"
    half_RB1 = (steps_RB * (0.5 + _SLACK))[..., None]
    if scales.offsets is None:  # a block may lie either way round: one side has a code more
        at_end_RBI = values_RBI.abs() >= (steps_RB * (scales.levels // 2 - 1))[..., None] - half_RB1
    else:
        codes_RBI = values_RBI + scales.offsets[..., None]
        at_end_RBI = (codes_RBI <= half_RB1) | (codes_RBI >= (steps_RB * (scales.levels - 1))[..., None] - half_RB1)
    clipped_RB = scales.unit * (scales.levels / 2) + scales.offset_unit / 2 + _CLIPPED * needed_RB
    limit_RBI = half_RB1 + at_end_RBI * clipped_RB[..., None] + _TINY + values_RBI.abs() * 1e-6
    if not scales.together:  # integers were chosen before their own scale was rounded to 16 bits
        offsets_RB = 0.0 if scales.offsets is None else scales.offsets.abs()
        limit_RBI += (values_RBI.abs() + 2 * torch.as_tensor(offsets_RB)[..., None]) * HALF_ULP["fp16"]
    return limit_RBI.flatten(1)[:, :columns], problem


def _largest(needed_RB: torch.Tensor, scales: Searched) -> torch.Tensor:
    """Of each super-block, over the steps that a scale of its few bits has."""
    if not scales.together:
        return torch.zeros_like(needed_RB)
    rows = len(needed_RB)
    largest: torch.Tensor = needed_RB.reshape(rows, -1, scales.together).amax(-1) / scales.scale_levels
    return largest.repeat_interleave(scales.together, dim=1)
