"""Which rows and columns of a weight a plan keeps. Everything follows from what an axis indexes."""

from __future__ import annotations

from collections.abc import Sequence

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
        "ffn": (layer.ffn, architecture.ffn_size, 1),
    }
    if axis not in units:
        return None
    indices, count, size = units[axis]
    if len(indices) == count:
        return None
    starts = torch.tensor(indices, dtype=torch.int64) * size
    return (starts[:, None] + torch.arange(size)).flatten()


def take(w: torch.Tensor, dim: int, positions: torch.Tensor | None) -> torch.Tensor:
    """`w` at `positions` along `dim`: a copy, or `w` itself when positions is None."""
    return w if positions is None else w.index_select(dim, positions)
