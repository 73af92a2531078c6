"""Blocks of weights that lie on a grid of few levels: what was quantized before has one, and it can be kept as it is.

Whoever made the grid chose it with more knowledge than the weights have now: the publisher of a GGUF file, or a
rounding that used data. Rounding such a block to any other grid of as many levels only adds an error. The grid is found
in the values, so it does not matter where they come from, or what else was cut: a block that is whole shows its own.

Legend: N blocks, S weights of a block.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

TOLERANCE = 0.08
"""Of a step: a checkpoint that was saved in bf16 has no more left of its grid. Chance puts a block of 32 there once in
10^24 times."""

_COMMON = 2
_SOME = 0.25
"""Share of a row's blocks that must lie on the first, commonest grids before rarer ones are tried in it."""

MOST = 0.9
"""Share of a matrix's blocks on a grid from which on the matrix counts as rounded already."""

_SAMPLE_ROWS = 64

_Floats = npt.NDArray[np.float32]
_Flags = npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Grids:
    """Steps [..., blocks] of blocks, where they lie on a grid; elsewhere `fits` is false and the step means nothing."""

    fits: _Flags
    steps: _Floats


def symmetric_grids(blocks: _Floats, bits: int) -> Grids:
    """Grids of multiples of a step, from -2^(bits-1) to 2^(bits-1) - 1 steps. Blocks are [..., blocks, S]."""
    half = 2 ** (bits - 1)
    largest = np.take_along_axis(blocks, np.abs(blocks).argmax(-1)[..., None], -1)[..., 0]
    # A negative step puts a largest value that is positive at the end that reaches further, as Q4_0 does.
    levels = [-half, half - 1, *(range(half - 2, 0, -1) if bits < 8 else ())]
    return _first_that_fits(blocks, largest, levels)


def offset_grids(blocks: _Floats, bits: int) -> Grids:
    """Grids of 2^bits levels from the smallest value of a block on. Blocks are [..., blocks, S]."""
    low = blocks.min(-1, keepdims=True)
    span = blocks.max(-1) - low[..., 0]
    return _first_that_fits(blocks - low, span, range(2**bits - 1, 0, -1))


def lies_on_grid(w_OI: _Floats, *, block_size: int, bits: int, has_offsets: bool) -> bool:
    """Whether a matrix is one that was rounded already, in blocks such as these.

    Some of its rows are looked at, and a last block that is short is not.
    """
    rows, whole = len(w_OI), w_OI.shape[1] // block_size * block_size
    some = np.ascontiguousarray(w_OI[:: -(-rows // _SAMPLE_ROWS), :whole], np.float32)
    blocks = some.reshape(len(some), -1, block_size)
    used = blocks.any(-1)
    if not used.any():
        return False
    grids = (offset_grids if has_offsets else symmetric_grids)(blocks, bits)
    return bool(grids.fits[used].mean() >= MOST)


def _first_that_fits(blocks: _Floats, reach: _Floats, levels: range | list[int]) -> Grids:
    """The first of `reach` / level that is a step of all weights of a block; the first levels are the commonest."""
    lowest, highest = (min(levels[0], 0), max(levels[0], -levels[0] - 1)) if levels[0] < 0 else (0, levels[0])
    fits = np.zeros(reach.shape, bool)
    steps = np.ones_like(reach)
    left = np.ones_like(fits)
    for i, level in enumerate(levels):
        if i == _COMMON:
            # By row, so that a row's result does not depend on the rows beside it.
            left = ~fits & (fits.mean(-1, keepdims=True) >= _SOME)
        if not left.any():
            break
        step = np.where(reach[left] == 0, 1, reach[left] / np.float32(level)).astype(np.float32)
        units = blocks[left] / step[:, None]
        whole = np.rint(units)
        good = ((np.abs(units - whole) <= TOLERANCE) & (whole >= lowest) & (whole <= highest)).all(-1)
        steps[left] = step
        fits[left] |= good
        left &= ~fits
    return Grids(fits, steps)
