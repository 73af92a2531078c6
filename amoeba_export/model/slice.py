"""Which rows and columns of a weight a plan keeps. Everything follows from what an axis indexes."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch

from amoeba_export.ir import Architecture, Axis, LayerPlan


def kept_positions(axis: Axis, layer: LayerPlan | None, architecture: Architecture) -> torch.Tensor | None:
    """Positions along `axis` that `layer` keeps, increasing, or None when it keeps all of them.

    A head is `head_dim` neighbouring positions. Axes that no plan cuts, and weights outside the layers (`layer` None),
    are kept whole.
    """
    if layer is None:
        return None
    units: dict[Axis, tuple[Sequence[int], int, int]] = {
        "query": (layer.query_heads, architecture.num_heads, architecture.head_dim),
        "kv": (layer.kv_heads, architecture.num_kv_heads, architecture.head_dim),
        "ffn": (layer.ffn, architecture.ffn_size, architecture.unit_size),
        "expert": (layer.ffn, architecture.ffn_size, 1),
    }
    if axis not in units:
        return None
    indices, count, size = units[axis]
    if len(indices) == count:
        return None
    starts = torch.tensor(indices, dtype=torch.int64) * size
    return (starts[:, None] + torch.arange(size)).flatten()


Empty = Callable[[tuple[int, ...], torch.dtype], torch.Tensor]
"""Makes a tensor with any content: `allocate`, or `Buffers.empty`."""

_INTEGERS = {1: np.uint8, 2: np.int16, 4: np.int32, 8: np.int64}
"""By size in bytes: what numpy moves around as it is, bfloat16 among them."""


def allocate(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """A new tensor with any content."""
    return torch.empty(shape, dtype=dtype)


def take(w: torch.Tensor, dim: int, positions: torch.Tensor | None) -> torch.Tensor:
    """`w` at `positions` along `dim`: a copy, or `w` itself when positions is None."""
    return w if positions is None else w.index_select(dim, positions)


def take_into(
    out_OI: torch.Tensor, w_OI: torch.Tensor, rows: torch.Tensor | None, columns: torch.Tensor | None
) -> None:
    """Fill `out_OI`, of the dtype of `w_OI`, with the kept rows and columns of it. Both lie row by row in memory."""
    if columns is None:
        if rows is None:
            out_OI.copy_(w_OI)
        else:
            torch.index_select(w_OI, 0, rows, out=out_OI)
        return
    if rows is not None:
        w_OI = w_OI.index_select(0, rows)
    # torch gathers columns at a quarter of this speed. 'clip' lets numpy write to `out` directly; nothing is clipped.
    whole, cut = (tensor.view(torch.uint8).numpy().view(_INTEGERS[tensor.itemsize]) for tensor in (w_OI, out_OI))
    np.take(whole, columns.numpy(), axis=1, out=cut, mode="clip")
