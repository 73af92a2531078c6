"""Adapters into weights: W' = W + scale * b @ a, on the kept rows and columns only, in fp32, a few rows at a time.

O out features, I in features, R rank. A DoRA row is rescaled by the norm of the whole row of W', so its columns are cut
after the merge; everything else is cut first, and nothing is computed that would be thrown away.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from amoeba_export.ir import AdapterDelta
from amoeba_export.materialize.slice import take

ROWS = 512
"""Rows merged at once. The fp32 rows of a 7B FFN weight then take 23 MB; larger blocks were not faster."""


def cut_and_merge(
    w_OI: torch.Tensor,
    rows: torch.Tensor | None,
    columns: torch.Tensor | None,
    deltas: Sequence[AdapterDelta],
    dtype: torch.dtype,
) -> torch.Tensor:
    """The kept part of a linear weight with its adapters merged.

    Adapters apply in order, each to the result of the one before (as peft merges them).

    Args:
        w_OI: The source weight, read and never written.
        rows: Kept rows, or None for all.
        columns: Kept columns, or None for all.
        deltas: What each adapter does to the whole weight.
        dtype: Of the result. Sums are fp32 and rounded once.

    Returns:
        The cut weight. It is `w_OI` itself when nothing has to change.
    """
    if not deltas:
        return take(take(w_OI, 0, rows), 1, columns).to(dtype)
    cut_late = any(delta.magnitude_O is not None for delta in deltas)
    factors = [
        (
            take(delta.b_OR, 0, rows).to(torch.float32) * delta.scale,
            take(delta.a_RI, 1, None if cut_late else columns).to(torch.float32),
            None if delta.magnitude_O is None else take(delta.magnitude_O, 0, rows).to(torch.float32),
        )
        for delta in deltas
    ]
    num_rows = w_OI.shape[0] if rows is None else len(rows)
    merged = torch.empty(num_rows, w_OI.shape[1] if columns is None else len(columns), dtype=dtype)
    for start in range(0, num_rows, ROWS):
        block = slice(start, min(start + ROWS, num_rows))
        part = w_OI[block] if rows is None else w_OI.index_select(0, rows[block])
        if not cut_late:
            part = take(part, 1, columns)
        part = part.to(torch.float32, copy=True)  # without copy, an uncut fp32 block would be the source itself
        for b_OR, a_RI, magnitude_O in factors:
            part.addmm_(b_OR[block], a_RI)
            if magnitude_O is not None:
                part *= (magnitude_O[block] / part.norm(dim=1)).unsqueeze(1)
        merged[block] = take(part, 1, columns) if cut_late else part
    return merged
