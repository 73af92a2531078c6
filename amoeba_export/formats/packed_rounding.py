"""What a rounding that uses data has to know of W4A16: weights as the writer scales them, and their grids."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import partial

import torch

from amoeba_export.formats.equalize import Equalizer, layer_names, scaled
from amoeba_export.formats.packed import SCHEMES, group_size, is_rounded
from amoeba_export.ir import Subnet
from amoeba_export.ir.rounded import Grid


def takes_data(dtype: str, *, asked: bool) -> bool:
    """See `ChosenWithData`."""
    return dtype in SCHEMES


def equalizer(names: Iterable[str], subnet: Subnet, dtype: str) -> Equalizer:
    """What makes channels alike in a packed file; matrices on a grid of it keep that."""
    dense = subnet.architecture
    is_kept = partial(is_rounded, group=group_size(dense), scheme=SCHEMES[dtype])
    return Equalizer(names, subnet.family, norm_offset=dense.base.norm_offset, is_kept=is_kept)


def scaled_layers(subnet: Subnet, dtype: str) -> Iterator[tuple[str, torch.Tensor]]:
    """See `ChosenWithData`."""
    return scaled(subnet, equalizer(layer_names(subnet), subnet, dtype))


def grid_of(name: str, weight: torch.Tensor, subnet: Subnet, dtype: str) -> Grid | None:
    """See `ChosenWithData`."""
    group, scheme = group_size(subnet.architecture), SCHEMES[dtype]
    if is_rounded(weight, group, scheme):
        return None
    return Grid(block_size=group, has_offsets=not scheme.symmetric, whole_zeros=True, step_dtype="bf16")


def head_grid(weight: torch.Tensor, dtype: str) -> None:
    """See `ChosenWithData`. It is not rounded."""
    return
