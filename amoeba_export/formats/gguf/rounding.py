"""Q4_0 on a grid that was chosen before: how it is kept, and what a rounding that uses data has to know of it.

llama.cpp's quantizer would choose other steps, so a matrix that lies on a grid of Q4_0 does not go through it. K-quants
do: llama.cpp searches their scales.

Legend: O out, I in, B blocks of a row, S weights of a block.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
import torch

from amoeba_export.formats.equalize import Equalizer, is_equalized, layer_names, scaled
from amoeba_export.formats.gguf.layout import BLOCK
from amoeba_export.formats.grid import lies_on_grid, symmetric_grids
from amoeba_export.ir import Family, Subnet
from amoeba_export.ir.rounded import Grid

BITS = 4


def takes_data(dtype: str) -> bool:
    """See `ChosenWithData`."""
    return dtype == "int4"


def equalizer(names: Iterable[str], family: Family, dtype: str, *, norm_offset: float) -> Equalizer:
    """What makes channels alike in a file of a `--dtype`; matrices on a grid of it keep that."""
    is_kept = _is_kept if takes_data(dtype) else None
    return Equalizer(names if is_equalized("gguf", dtype) else (), family, norm_offset=norm_offset, is_kept=is_kept)


def scaled_layers(subnet: Subnet, dtype: str) -> Iterator[tuple[str, torch.Tensor]]:
    """See `ChosenWithData`."""
    offset = subnet.architecture.base.norm_offset
    return scaled(subnet, equalizer(layer_names(subnet), subnet.family, dtype, norm_offset=offset))


def grid_of(weight: torch.Tensor, subnet: Subnet, dtype: str) -> Grid | None:
    """See `ChosenWithData`. Rows that are no whole blocks are in F16; those of neurons are filled up."""
    if subnet.architecture.base.hidden_size % BLOCK or _is_kept(weight):
        return None
    return Grid(block_size=BLOCK, has_offsets=False, step_dtype="fp16")


def quantize_q4_0(rows_OI: npt.NDArray[np.float32]) -> npt.NDArray[np.uint8]:
    """Rows of whole blocks as Q4_0: blocks on a grid of it as they are, others as llama.cpp rounds them."""
    packed: npt.NDArray[Any] = gguf.quantize(rows_OI, gguf.GGMLQuantizationType.Q4_0)
    blocks_OBS = rows_OI.reshape(len(rows_OI), -1, BLOCK)
    grids = symmetric_grids(blocks_OBS, BITS)
    kept = grids.fits & blocks_OBS.any(-1)
    if not kept.any():
        return packed
    steps = grids.steps[kept]
    codes = (np.rint(blocks_OBS[kept] / steps[:, None]) + 2 ** (BITS - 1)).astype(np.uint8)
    nibbles = codes[:, : BLOCK // 2] | (codes[:, BLOCK // 2 :] << 4)
    by_block = packed.reshape(len(rows_OI), blocks_OBS.shape[1], -1)
    by_block[kept] = np.concatenate([steps.astype("<f2")[:, None].view(np.uint8), nibbles], 1)
    return packed


def _is_kept(w_OI: torch.Tensor) -> bool:
    return lies_on_grid(w_OI.float().numpy(), block_size=BLOCK, bits=BITS, has_offsets=False)
