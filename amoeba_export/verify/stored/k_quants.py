"""Scales and offsets in the blocks of llama.cpp's K-quants, and of what replaces them where rows are short."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import gguf
import numpy as np
import numpy.typing as npt
import torch

from amoeba_export.verify.stored.tensor import Searched

_Type = gguf.GGMLQuantizationType
_Bytes = npt.NDArray[np.uint8]

NAMES = {_Type.Q6_K: "q6_k", _Type.Q5_K: "q5_k_m", _Type.Q5_0: "q5_k_m", _Type.Q5_1: "q5_k_m", _Type.Q4_K: "q4_k_m"}
"""The `--dtype` that is as fine."""

BLOCKS = {_Type.Q6_K: 16, _Type.Q5_K: 32, _Type.Q4_K: 32, _Type.Q5_0: 32, _Type.Q5_1: 32}
"""Values that share a scale."""


def scales_of(kind: gguf.GGMLQuantizationType, data: _Bytes, num_rows: int) -> Searched:
    """Of a tensor's bytes. See ggml-common.h for the layout of blocks."""
    size = gguf.GGML_QUANT_SIZES[kind][1]
    return _READERS[kind](np.ascontiguousarray(data).reshape(-1).view(np.uint8).reshape(-1, size), num_rows)


def _half(blocks: _Bytes, place: int) -> npt.NDArray[np.float32]:
    values: npt.NDArray[np.float32] = np.ascontiguousarray(blocks[:, place : place + 2]).view("<f2").astype(np.float32)
    return values


def _rows(values: npt.NDArray[np.float32], num_rows: int) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(values)).reshape(num_rows, -1)


def _k45(levels: int) -> Callable[[_Bytes, int], Searched]:
    def read(blocks: _Bytes, num_rows: int) -> Searched:
        scale, offset = _half(blocks, 0), _half(blocks, 2)
        packed = blocks[:, 4:16].astype(np.uint16)
        # Eight scales and eight offsets of 6 bits: the first four of each lie whole in a byte, the others in pieces.
        low, middle, high = packed[:, 0:4], packed[:, 4:8], packed[:, 8:12]
        steps = np.concatenate([low & 63, (high & 15) | (low >> 6 << 4)], axis=1)
        offsets = np.concatenate([middle & 63, (high >> 4) | (middle >> 6 << 4)], axis=1)
        whole = np.ones((1, 8), dtype=np.float32)
        return Searched(
            levels=levels,
            steps=_rows(scale * steps.astype(np.float32), num_rows),
            offsets=_rows(offset * offsets.astype(np.float32), num_rows),
            unit=_rows(np.abs(scale) * whole, num_rows),
            offset_unit=_rows(np.abs(offset) * whole, num_rows),
            together=8,
            scale_levels=63,
        )

    return read


def _q6_k(blocks: _Bytes, num_rows: int) -> Searched:
    scale = _half(blocks, 208)
    steps = np.ascontiguousarray(blocks[:, 192:208]).view(np.int8).astype(np.float32)
    unit = _rows(np.abs(scale) * np.ones((1, 16), dtype=np.float32), num_rows)
    return Searched(
        levels=64,
        steps=_rows(scale * steps, num_rows),
        offsets=None,
        unit=unit,
        offset_unit=torch.zeros_like(unit),
        together=16,
        scale_levels=127,
    )


def _q5_0(blocks: _Bytes, num_rows: int) -> Searched:
    steps = _rows(_half(blocks, 0), num_rows)
    nothing = torch.zeros_like(steps)
    return Searched(levels=32, steps=steps, offsets=None, unit=nothing, offset_unit=nothing)


def _q5_1(blocks: _Bytes, num_rows: int) -> Searched:
    steps, offsets = _rows(_half(blocks, 0), num_rows), _rows(-_half(blocks, 2), num_rows)
    nothing = torch.zeros_like(steps)
    return Searched(levels=32, steps=steps, offsets=offsets, unit=nothing, offset_unit=nothing)


_READERS: Mapping[gguf.GGMLQuantizationType, Callable[[_Bytes, int], Searched]] = {
    _Type.Q4_K: _k45(16),
    _Type.Q5_K: _k45(32),
    _Type.Q6_K: _q6_k,
    _Type.Q5_0: _q5_0,
    _Type.Q5_1: _q5_1,
}
