"""Q4_0 on a grid that was chosen before: how it is kept, and what a rounding that uses data has to know of it.

llama.cpp's quantizer would choose other steps, so a matrix that lies on a grid of Q4_0 does not go through it.
Blocks of K-quants do: llama.cpp searches them, with an importance matrix.

Legend: O out, I in, B blocks of a row, S weights of a block.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
import torch

from amoeba_export.formats.equalize import Equalizer, is_equalized, layer_names, scaled
from amoeba_export.formats.gguf.architecture import choose_architecture
from amoeba_export.formats.gguf.k_quants import K_QUANTS, k_quant_type
from amoeba_export.formats.gguf.layout import BLOCK, q_factor, written_layers
from amoeba_export.formats.grid import lies_on_grid, symmetric_grids
from amoeba_export.ir import Family, Subnet
from amoeba_export.ir.rounded import BlockQuantizer, Grid
from amoeba_export.llama_cpp.architectures import gguf_place
from amoeba_export.llama_cpp.quantizer import has_quantizer, quantize_rows

BITS = 4

WITH_DATA = ("q4_k_m", "q5_k_m")
"""Mixtures that lose enough for data to matter."""


def takes_data(dtype: str, *, asked: bool) -> bool:
    """See `ChosenWithData`. Mixtures only if asked: they lose less than `int4`, and the sweep takes minutes."""
    return dtype == "int4" or (asked and dtype in WITH_DATA and has_quantizer())


def equalizer(names: Iterable[str], family: Family, dtype: str, *, norm_offset: float) -> Equalizer:
    """What makes channels alike in a file of a `--dtype`; matrices on a grid of it keep that."""
    is_kept = _is_kept if dtype == "int4" else None
    return Equalizer(names if is_equalized("gguf", dtype) else (), family, norm_offset=norm_offset, is_kept=is_kept)


def scaled_layers(subnet: Subnet, dtype: str) -> Iterator[tuple[str, torch.Tensor]]:
    """See `ChosenWithData`."""
    offset = subnet.architecture.base.norm_offset
    return scaled(subnet, equalizer(layer_names(subnet), subnet.family, dtype, norm_offset=offset))


@dataclass(frozen=True, slots=True)
class LlamaCppBlocks:
    """See `BlockQuantizer`: a type of GGUF, rounded by llama.cpp with an importance matrix."""

    block_size: int
    kind: int

    def quantize(self, w_OI: torch.Tensor, importance_I: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """See `BlockQuantizer`."""
        kind = gguf.GGMLQuantizationType(self.kind)
        sizes = gguf.GGML_QUANT_SIZES[kind]
        packed = quantize_rows(w_OI.cpu().numpy(), self.kind, sizes, importance_I=importance_I.cpu().numpy())
        values = torch.from_numpy(gguf.dequantize(packed, kind))
        return torch.from_numpy(packed), values.to(w_OI.device)


def grid_of(name: str, weight: torch.Tensor, subnet: Subnet, dtype: str) -> Grid | BlockQuantizer | None:
    """See `ChosenWithData`. Rows that are no whole blocks are in F16; those of neurons are filled up."""
    if subnet.architecture.base.expert_size:  # each has inputs of its own, and the sweep knows one input of a matrix
        return None
    if dtype in K_QUANTS:
        return _blocks_of(name, weight, subnet, dtype)
    if subnet.architecture.base.hidden_size % BLOCK or _is_kept(weight):
        return None
    return Grid(block_size=BLOCK, has_offsets=False, step_dtype="fp16")


def head_grid(weight: torch.Tensor, dtype: str) -> None:
    """See `ChosenWithData`. It has 6 or 8 bits, and loses little."""
    return


def _blocks_of(name: str, weight: torch.Tensor, subnet: Subnet, dtype: str) -> LlamaCppBlocks | None:
    """None for a matrix in F16, and for one that is multiplied before it is written."""
    dense, place = subnet.architecture, subnet.family.place(name)
    architecture = choose_architecture(dense)
    if place.role == "q" and not dense.base.qk_norm and q_factor(architecture, dense) != 1.0:
        return None
    layers = written_layers(dense, architecture, quantized=True)
    columns = -(-weight.shape[1] // BLOCK) * BLOCK if place.role == "down" else weight.shape[1]
    target = gguf_place(architecture, place.role, place.layer, place.part).tensor
    kind = k_quant_type(dtype, target, columns, layers, tied=dense.base.tied_embeddings)
    if kind is gguf.GGMLQuantizationType.F16:
        return None
    return LlamaCppBlocks(block_size=gguf.GGML_QUANT_SIZES[kind][0], kind=int(kind))


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
