"""Adapters into weights: W' = W + scale * b @ a, on the kept rows and columns only, in fp32, a few rows at a time.

O out features, I in features, R rank. A DoRA row is rescaled by the norm of the whole row of W', so its columns are cut
after the merge; everything else is cut first, and nothing is computed that would be thrown away.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from amoeba_export.ir import AdapterDelta
from amoeba_export.model.slice import Empty, allocate, take, take_into

ROWS = 256
"""Rows merged at once, in memory that every block uses again: 11 MB for the fp32 rows of a 7B FFN weight. A processor's
cache holds that, so that widening, adding and rounding a block costs little more than reading it once."""


def cut_and_merge(
    w_OI: torch.Tensor,
    rows: torch.Tensor | None,
    columns: torch.Tensor | None,
    deltas: Sequence[AdapterDelta],
    dtype: torch.dtype,
    *,
    empty: Empty = allocate,
) -> torch.Tensor:
    """The kept part of a linear weight with its adapters merged.

    Adapters apply in order, each to the result of the one before (as peft merges them).

    Args:
        w_OI: The source weight, read and never written.
        rows: Kept rows, or None for all.
        columns: Kept columns, or None for all.
        deltas: What each adapter does to the whole weight.
        dtype: Of the result. Sums are fp32 and rounded once.
        empty: Where the result goes.

    Returns:
        The cut weight. It is `w_OI` itself when nothing has to change.
    """
    if not deltas and rows is None and columns is None and w_OI.dtype == dtype:
        return w_OI
    num_rows = w_OI.shape[0] if rows is None else len(rows)
    num_columns = w_OI.shape[1] if columns is None else len(columns)
    cut = empty((num_rows, num_columns), dtype)
    if not deltas and w_OI.dtype == dtype:
        take_into(cut, w_OI, rows, columns)
        return cut
    # The whole row is needed for its norm.
    before, after = (None, columns) if any(delta.magnitude_O is not None for delta in deltas) else (columns, None)
    factors = [_factors(delta, rows, before) for delta in deltas]
    width = w_OI.shape[1] if before is None else len(before)
    narrow_BI = torch.empty(min(ROWS, num_rows), width, dtype=w_OI.dtype)
    wide_BI = torch.empty(min(ROWS, num_rows), width, dtype=torch.float32)
    for start in range(0, num_rows, ROWS):
        block = slice(start, min(start + ROWS, num_rows))
        size = block.stop - start
        part = w_OI[block] if rows is None else w_OI
        if rows is not None or before is not None:
            take_into(narrow_BI[:size], part, None if rows is None else rows[block], before)
            part = narrow_BI[:size]
        wide = wide_BI[:size].copy_(part)
        for b_OR, a_RI, magnitude_O in factors:
            wide.addmm_(b_OR[block], a_RI)
            if magnitude_O is not None:
                wide *= (magnitude_O[block] / wide.norm(dim=1)).unsqueeze(1)
        cut[block] = take(wide, 1, after)
    return cut


def _factors(
    delta: AdapterDelta, rows: torch.Tensor | None, columns: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Scaled b, a and magnitude on the kept rows and columns, in fp32."""
    return (
        take(delta.b_OR, 0, rows).to(torch.float32) * delta.scale,
        take(delta.a_RI, 1, columns).to(torch.float32),
        None if delta.magnitude_O is None else take(delta.magnitude_O, 0, rows).to(torch.float32),
    )
