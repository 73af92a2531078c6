"""Rows of frozen weights that a cut keeps, and products with them.

B batch, T tokens, R rank, O out, I in features.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch.nn import functional

from amoeba_export.finetune.smol import Pair


@dataclass(frozen=True, slots=True, eq=False)
class Kept:
    """Rows of a weight that are kept.

    Attributes:
        held: Where they are in the weight as it is held.
        source: Where the same rows are in the source weight, and in its low-rank change; None for all, in order.
    """

    held: slice | torch.Tensor
    source: torch.Tensor | None


class HeldOrder:
    """The order in which a layer holds its heads, or neurons: `block` rows of a weight each.

    Attributes:
        rows: Source row of every held row; None where the order is the source's.
    """

    def __init__(self, units: torch.Tensor, block: int) -> None:
        self._units, self._block = units, block
        self.rows = None if torch.equal(units, torch.arange(len(units))) else rows_of(units, block)

    def keep(self, units: tuple[int, ...], device: torch.device) -> Kept:
        """The rows of `units`, which are source indices."""
        is_kept = torch.zeros(len(self._units), dtype=torch.bool)
        is_kept[list(units)] = True
        held = is_kept[self._units].nonzero()[:, 0]
        in_source = rows_of(self._units[held], self._block).to(device)
        is_first = torch.equal(held, torch.arange(len(held)))
        return Kept(
            held=slice(0, len(held) * self._block) if is_first else rows_of(held, self._block).to(device),
            source=None if len(held) == len(self._units) and self.rows is None else in_source,
        )


class Projection(NamedTuple):
    """A linear weight [O, I] with its bias [O], the rows of both that are kept, and the weight's low-rank change."""

    w_OI: torch.Tensor
    bias_O: torch.Tensor | None
    kept: Kept
    pair: Pair | None


def rows_of(units: torch.Tensor, block: int) -> torch.Tensor:
    """Row indices of blocks of `block` rows."""
    return (units[:, None] * block + torch.arange(block)).flatten()


def expand(x_BTI: torch.Tensor, *projections: Projection) -> list[torch.Tensor]:
    """X @ W[kept].T + bias[kept] for each, with the low-rank change of those rows. All A are one product."""
    ys = [
        functional.linear(x_BTI, held(one.w_OI, one.kept), None if one.bias_O is None else held(one.bias_O, one.kept))
        for one in projections
    ]
    changed = [(i, one.kept, one.pair) for i, one in enumerate(projections) if one.pair is not None]
    if not changed:
        return ys
    a_RI = torch.cat([a_RI for _, _, (a_RI, _) in changed])
    low_BTR = functional.linear(x_BTI, a_RI.to(x_BTI.dtype))
    parts = torch.split(low_BTR, [len(a_RI) for _, _, (a_RI, _) in changed], dim=-1)
    for (i, kept, (_, b_OR)), part_BTR in zip(changed, parts, strict=True):
        b_OR = b_OR if kept.source is None else b_OR.index_select(0, kept.source)
        ys[i] = _add_product(ys[i], part_BTR, b_OR)
    return ys


def contract(
    x_BTI: torch.Tensor, w_IO: torch.Tensor, bias_O: torch.Tensor | None, kept: Kept, pair: Pair | None
) -> torch.Tensor:
    """X @ W[kept] + bias for a transposed weight, of which those rows are what `x` has left."""
    y_BTO = x_BTI @ held(w_IO, kept)
    if bias_O is not None:
        y_BTO = y_BTO + bias_O
    if pair is None:
        return y_BTO
    a_RI, b_OR = pair
    a_RI = a_RI if kept.source is None else a_RI.index_select(1, kept.source)
    return _add_product(y_BTO, functional.linear(x_BTI, a_RI.to(x_BTI.dtype)), b_OR)


def _add_product(y_BTO: torch.Tensor, low_BTR: torch.Tensor, b_OR: torch.Tensor) -> torch.Tensor:
    y = torch.addmm(y_BTO.flatten(0, 1), low_BTR.flatten(0, 1), b_OR.to(y_BTO.dtype).t())
    return y.view(y_BTO.shape)


def held(weight: torch.Tensor, kept: Kept) -> torch.Tensor:
    """The kept rows of a weight that is held best first."""
    return weight[kept.held] if isinstance(kept.held, slice) else weight.index_select(0, kept.held)
