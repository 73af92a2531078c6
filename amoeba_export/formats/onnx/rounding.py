"""What a rounding that uses data has to know of this format: weights as it scales them, and on which grids they go."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch

from amoeba_export.formats.equalize import Equalizer, is_equalized, layer_names, scaled
from amoeba_export.formats.onnx.precision import PRECISIONS
from amoeba_export.formats.onnx.quantize import is_rounded
from amoeba_export.ir import Subnet
from amoeba_export.ir.rounded import Grid

BITS = 4
"""More lose nothing that data could save."""


def takes_data(dtype: str, *, asked: bool) -> bool:
    """Whether the layers of a `--dtype` have matrices whose integers are worth choosing with data."""
    linear = PRECISIONS[dtype].linear
    return linear is not None and linear.bits == BITS


def scaled_layers(subnet: Subnet, dtype: str) -> Iterator[tuple[str, torch.Tensor]]:
    """The weights of the layers in fp32, in order, scaled as the writer of `dtype` scales them before it rounds."""
    linear = PRECISIONS[dtype].linear
    assert linear is not None, dtype
    names = layer_names(subnet)
    equalizer = Equalizer(
        names if is_equalized("onnx", dtype) else (),
        subnet.family,
        norm_offset=subnet.architecture.base.norm_offset,
        is_kept=partial(is_rounded, encoding=linear),
    )
    return scaled(subnet, equalizer)


def grid_of(name: str, weight: torch.Tensor, subnet: Subnet, dtype: str) -> Grid | None:
    """How a matrix in a layer is rounded; None where it keeps the grid that it has."""
    linear = PRECISIONS[dtype].linear
    assert linear is not None, dtype
    encoding = linear.for_columns(weight.shape[1])
    if is_rounded(weight, encoding):
        return None
    return Grid(block_size=encoding.block_size, has_offsets=encoding.has_offsets, step_dtype="fp32")


def head_grid(weight: torch.Tensor, dtype: str) -> Grid | None:
    """See `ChosenWithData`. Blocks are those of the layers; narrower ones, of odd widths, stay as they are."""
    precision = PRECISIONS[dtype]
    encoding = precision.head_of(weight.shape[1])
    if encoding is None or encoding.bits != BITS or encoding != precision.linear or is_rounded(weight, encoding):
        return None
    return Grid(block_size=encoding.block_size, has_offsets=encoding.has_offsets, step_dtype="fp32")
