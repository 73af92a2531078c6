"""Channels that were scaled to look alike before they became integers (`formats/equalize.py`): by which factors.

What makes a channel is divided by what its readers are multiplied with. Any positive factors leave the function as it
is, so they are read from the file: from the norm, which is not rounded, and from the rows of `up`. A gain that is
nearly zero tells no factor: there, the columns of a reader do. Behind a gain of zero, a column may be anything.
"""

from __future__ import annotations

import math

import torch

from amoeba_export.ir.family import READERS
from amoeba_export.verify.expected import Expected, ExpectedWeights
from amoeba_export.verify.numerics import HALF_ULP
from amoeba_export.verify.stored import StoredWeights
from amoeba_export.verify.stored.tensor import Stored

_OFFSET_SLACK = 2.0**-22
"""Of what a file adds to the weight of a norm: it was taken off again and added once more."""

_COARSE = 0.08
"""Share of the norm of a row or column that rounding may change. Two factors are 0.19 apart."""

_CLEAR = 3
"""A gain of so many times its slack tells a factor from the next."""


def offset_slack(found: Stored) -> float:
    """By how much the gains of a norm may be off that a file has in place of the family's weights."""
    return found.offset * _OFFSET_SLACK


class Channels:
    """The factors of a file. Its weights come one by one: norms before what reads them, and `up` before `down`."""

    def __init__(self, stored: StoredWeights, expected: ExpectedWeights) -> None:
        self._stored, self._expected = stored, expected
        self._columns: dict[str, torch.Tensor] = {}
        self._rows: dict[str, torch.Tensor] = {}
        self._silent: dict[str, torch.Tensor] = {}

    def scaled(self, name: str, wanted: Expected, found: Stored) -> Expected:
        """`wanted` with the channels scaled as those of the file are. Only what integers read is ever scaled."""
        family = self._expected.wanted.family
        place, values = family.find(name), wanted.values
        role, layer = (None, None) if place is None else (place.role, place.layer)
        if role is not None and role in READERS and values.shape == found.values.shape:
            readers = [family.weight(reader, layer) for reader in READERS[role]]
            factor_D = self._of_norm(readers, values, found)
            if factor_D is None:
                return wanted
            self._columns |= dict.fromkeys(readers, factor_D)
            lacking = self._lacking(found)
            self._silent |= dict.fromkeys(readers, (values == -lacking) & (found.values == -lacking))
            return Expected((values + lacking) / factor_D - lacking, wanted.slack + lacking * _OFFSET_SLACK)
        if name in self._columns:
            values = values * self._columns[name]
        is_up = place is not None and (place.role, place.part) == ("up", "weight")
        if is_up and _is_integers(found) and values.shape == found.values.shape:
            # A row has steps of its own, so how large it is survives rounding.
            is_heard = ~self._silent.get(name, torch.zeros(values.shape[1], dtype=torch.bool))
            norms_F = ((matrix * is_heard).norm(dim=1) for matrix in (values, found.values))
            factor_F = _on_grid(*norms_F, tolerance=_COARSE)
            self._rows |= {name: 1 / factor_F, family.bias("up", layer): 1 / factor_F}
            self._columns[family.weight("down", layer)] = factor_F
        if name in self._rows:
            factor = self._rows[name]
            values = values * (factor[:, None] if values.dim() == 2 else factor)
            if values.dim() == 1:  # a quotient on one side, a product on the other
                return Expected(values, wanted.slack + values.abs() * HALF_ULP["fp32"] * 4)
        if name in self._silent and values.shape == found.values.shape:
            values = found.values.where(self._silent[name], values)
        return Expected(values, wanted.slack)

    def _lacking(self, found: Stored) -> float:
        """What a runtime adds to the weight of a norm, so that it is a gain. What is scaled is the gain."""
        return self._expected.wanted.dense.base.norm_offset - found.offset

    def _of_norm(self, readers: list[str], weight_D: torch.Tensor, found: Stored) -> torch.Tensor | None:
        """What the channels of a norm were divided by; None where what reads them has no integers.

        Args:
            readers: The matrices that read it.
            weight_D: Of the norm, unscaled, as it would be stored.
            found: The norm as stored.
        """
        if readers[0] not in self._stored.names() or not _is_integers(self._stored.read(readers[0])):
            return None
        lacking, slack = self._lacking(found), torch.tensor(offset_slack(found))
        if lacking:
            slack = found.values.abs() * (2 * HALF_ULP[found.dtype]) + lacking * _OFFSET_SLACK
        gain_D = found.values + lacking
        factor_D = _on_grid(weight_D + lacking, gain_D, tolerance=1e-5 + HALF_ULP[found.dtype], slack=slack)
        is_clear_D = gain_D.abs() > _CLEAR * slack
        if is_clear_D.all():
            return factor_D
        return factor_D.where(is_clear_D, self._of_columns(readers))

    def _of_columns(self, readers: list[str]) -> torch.Tensor:
        """What columns were multiplied by, as far as their own rounding lets it be seen."""
        along_D = square_D = torch.zeros(())
        for name in readers:
            found = self._stored.read(name)
            unscaled = found.as_stored(self._expected.read(name).values)
            if self._expected.wanted.family.place(name).role != "up" and found.values.shape == unscaled.shape:
                along_D = along_D + (found.values * unscaled).sum(0)  # rows of `up` have factors of their own
                square_D = square_D + unscaled.square().sum(0)
        return _on_grid(along_D, square_D, tolerance=math.inf)  # where much was rounded away, any factor will do


def _is_integers(found: Stored) -> bool:
    return found.steps is not None or found.searched is not None


def _on_grid(
    scaled: torch.Tensor, by: torch.Tensor, *, tolerance: float, slack: torch.Tensor | None = None
) -> torch.Tensor:
    """The quotient of two tensors, where that is a power of two to a multiple of a quarter, and 1 elsewhere.

    Args:
        scaled: What the factor gives.
        by: What it is applied to.
        tolerance: Share by which rounding may have changed one of them.
        slack: By how much `by` may be off besides.
    """
    steps = ((scaled / by).abs().log2() * 4).nan_to_num(0.0, 0.0, 0.0).round().clamp(-64, 64)
    factor = torch.exp2(steps / 4)
    allowed = by.abs() * tolerance if slack is None else by.abs() * tolerance + slack
    near = (scaled - factor * by).abs() <= factor * allowed
    return factor.where(near, 1.0)
