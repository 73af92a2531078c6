"""Error-compensated rounding of one matrix: GPTQ (Frantar et al., 2022, arXiv:2210.17323, algorithm 1).

Columns are rounded in their natural order, and what rounding a column loses is made up for by those that follow, as far
as the inputs of the matrix are correlated. The step of a block is chosen when its first column is reached, from the
weights as they are then, by squared error weighted as the algorithm weighs it: a column by 1 / U_jj^2, U being the
Cholesky factor of the inverse Gram matrix. So what is lost counts as it does in the output of the matrix.

Legend: O out, C in, G blocks of a row, S weights of a block, K candidates for a step.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from amoeba_export.ir.dtype import DTYPES
from amoeba_export.ir.rounded import BlockQuantizer, Grid

DAMPING = 0.01
"""Of the mean diagonal of the Gram matrix, as in the paper."""

_ROWS = 4096
"""Rows that are rounded together: those of a head, all at once, would not fit into a processor's cache."""

_LAZY = 128
"""Columns that are compensated among themselves before the rest is, as in the paper."""

_SHRINK = tuple(1 - 0.04 * i for i in range(9))
"""Shares of the step that reaches the largest weight which are tried."""

LEVELS = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Rounded:
    """A matrix on its grid: codes_OC * steps + offsets, block by block.

    Attributes:
        codes_OC: From 0 to 15.
        steps_OG: Of each block.
        offsets_OG: Value of code 0 of each block.
        grid: That it lies on.
    """

    codes_OC: torch.Tensor
    steps_OG: torch.Tensor
    offsets_OG: torch.Tensor
    grid: Grid

    def values(self) -> torch.Tensor:
        """The matrix. [O, C], fp32."""
        return values_of(self.codes_OC, self.steps_OG, self.offsets_OG, self.grid.block_size)


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundedBlocks:
    """A matrix in blocks of a format that searches them itself.

    Attributes:
        packed_ON: Bytes of its rows, a last block that is short filled up.
        values_OC: What they stand for, fp32.
        kind: The number of the type in GGUF.
    """

    packed_ON: torch.Tensor
    values_OC: torch.Tensor
    kind: int

    def values(self) -> torch.Tensor:
        """See `values_OC`."""
        return self.values_OC


def values_of(
    codes_OC: torch.Tensor, steps_OG: torch.Tensor, offsets_OG: torch.Tensor, block_size: int
) -> torch.Tensor:
    """The matrix [O, C] that codes stand for, fp32. The last block may be short."""
    columns = codes_OC.shape[1]
    steps_OC = steps_OG.repeat_interleave(block_size, 1)[:, :columns]
    return codes_OC.float() * steps_OC + offsets_OG.repeat_interleave(block_size, 1)[:, :columns]


def factor_inverse(gram_CC: torch.Tensor, *, damping: float = DAMPING) -> torch.Tensor:
    """The upper Cholesky factor of the inverse of a damped Gram matrix, fp32. `gram_CC` (fp64) is written over.

    A channel that no input has gets the mean of the others: nothing depends on it.
    """
    diagonal_C = gram_CC.diagonal()
    mean = diagonal_C.mean()
    diagonal_C[diagonal_C == 0] = mean if mean > 0 else 1.0
    added = damping * diagonal_C.mean()
    for _ in range(8):
        diagonal_C += added
        factor_CC, failed = torch.linalg.cholesky_ex(gram_CC)
        if not failed:
            break
        added = added * 10  # inputs that are linearly dependent to the last bit
    inverse_CC = torch.cholesky_inverse(factor_CC)
    del factor_CC
    upper_CC: torch.Tensor = torch.linalg.cholesky(inverse_CC, upper=True)
    return upper_CC.float()


def round_matrix(w_OC: torch.Tensor, inverse_CC: torch.Tensor, grid: Grid) -> Rounded:
    """Round a matrix such that its outputs change as little as they can.

    Args:
        w_OC: fp32; not written into.
        inverse_CC: From `factor_inverse`, of the Gram matrix of its inputs.
        grid: What the result must lie on.
    """
    parts = [_round_rows(rows_OC.clone(), inverse_CC, grid) for rows_OC in torch.split(w_OC, _ROWS)]
    codes, steps, offsets = zip(*parts, strict=True)
    return Rounded(codes_OC=torch.cat(codes), steps_OG=torch.cat(steps), offsets_OG=torch.cat(offsets), grid=grid)


def _round_rows(
    w_OC: torch.Tensor, inverse_CC: torch.Tensor, grid: Grid
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes, steps and offsets of some rows, which are written over."""
    rows, columns = w_OC.shape
    size = grid.block_size
    codes_OC = torch.empty(rows, columns, dtype=torch.uint8, device=w_OC.device)
    steps_OG = w_OC.new_empty(rows, -(-columns // size))
    offsets_OG = torch.empty_like(steps_OG)
    lazy = max(_LAZY, size)
    for start in range(0, columns, lazy):
        end = min(start + lazy, columns)
        errors = w_OC.new_empty(rows, end - start)
        for column in range(start, end):
            if column % size == 0:
                block = slice(column, min(column + size, columns))
                weight_S = inverse_CC.diagonal()[block].square().reciprocal()
                step_O, offset_O = best_steps(w_OC[:, block], weight_S, grid)
                steps_OG[:, column // size], offsets_OG[:, column // size] = step_O, offset_O
            w_O = w_OC[:, column]
            code_O = ((w_O - offset_O) / step_O).round_().clamp_(0, LEVELS - 1)
            codes_OC[:, column] = code_O
            error_O = (w_O - (code_O * step_O + offset_O)) / inverse_CC[column, column]
            errors[:, column - start] = error_O
            w_OC[:, column + 1 : end].addr_(error_O, inverse_CC[column, column + 1 : end], alpha=-1)
        w_OC[:, end:].addmm_(errors, inverse_CC[start:end, end:], alpha=-1)
    return codes_OC, steps_OG, offsets_OG


def round_blocks(w_OC: torch.Tensor, square_C: torch.Tensor, quantizer: BlockQuantizer) -> RoundedBlocks:
    """Round a matrix by the quantizer's own search, with errors weighted by the size of its inputs.

    Blocks of scales are searched as a whole. Later ones do not make up for earlier ones: that is worse (dev/LOG.md).

    Args:
        w_OC: fp32.
        square_C: Of its inputs, the mean square, or a multiple of it.
        quantizer: Rounds whole blocks.
    """
    columns = w_OC.shape[1]
    padding = (0, -columns % quantizer.block_size)
    importance_C = square_C.float() + DAMPING * float(square_C.mean())  # no block counts for nothing
    packed_ON, values_OC = quantizer.quantize(
        torch.nn.functional.pad(w_OC, padding),
        torch.nn.functional.pad(importance_C, padding, value=float(importance_C.mean())),
    )
    return RoundedBlocks(packed_ON=packed_ON, values_OC=values_OC[:, :columns].contiguous(), kind=quantizer.kind)


def best_steps(w_OS: torch.Tensor, weight_S: torch.Tensor, grid: Grid) -> tuple[torch.Tensor, torch.Tensor]:
    """Step and offset of one block of each row, by weighted squared error over some candidates. [O] each."""
    candidates = _offset_candidates(w_OS) if grid.has_offsets else _symmetric_candidates(w_OS)
    candidates = [_held(step, offset, grid) for step, offset in candidates]
    best_O = torch.full_like(w_OS[:, 0], torch.inf)
    step_O, offset_O = torch.ones_like(best_O), torch.zeros_like(best_O)
    for step, offset in candidates:
        units_OS = ((w_OS - offset[:, None]) / step[:, None]).round_().clamp_(0, LEVELS - 1)
        left_OS = torch.addcmul(offset[:, None] - w_OS, units_OS, step[:, None])
        loss_O = left_OS.square_() @ weight_S
        is_better = loss_O < best_O
        best_O = torch.where(is_better, loss_O, best_O)
        step_O, offset_O = torch.where(is_better, step, step_O), torch.where(is_better, offset, offset_O)
    return step_O, offset_O


def _held(step_O: torch.Tensor, offset_O: torch.Tensor, grid: Grid) -> tuple[torch.Tensor, torch.Tensor]:
    """Step and offset as the format stores them."""
    if grid.step_dtype != "fp32":
        kind = DTYPES[grid.step_dtype].torch_dtype
        stored_O = step_O.to(kind).float()
        step_O = torch.where(stored_O == 0, torch.finfo(kind).smallest_normal, stored_O)
    if not grid.has_offsets:
        return step_O, -8 * step_O
    if grid.whole_zeros:
        offset_O = (offset_O / step_O).round_().clamp_(1 - LEVELS, 0) * step_O
    return step_O, offset_O


def _symmetric_candidates(w_OS: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """The largest weight at the end that reaches eight steps, or at either end with seven, and steps below that."""
    largest_O = w_OS.gather(1, w_OS.abs().argmax(1, keepdim=True))[:, 0]
    largest_O = torch.where(largest_O == 0, 1.0, largest_O)
    steps = [largest_O * (share / -8) for share in _SHRINK] + [largest_O.abs() * (share / 7) for share in _SHRINK[:3]]
    return [(step, -8 * step) for step in steps]


def _offset_candidates(w_OS: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """From the smallest weight to the largest, and ranges within."""
    low_O, high_O = w_OS.amin(1), w_OS.amax(1)
    span_O = torch.where(high_O > low_O, high_O - low_O, w_OS.abs().amax(1).clamp_min(1e-30))
    found = []
    for below in _SHRINK[:5]:
        for above in _SHRINK[:5]:
            share = below + above - 1
            found.append((span_O * (share / (LEVELS - 1)), low_O + (1 - below) * span_O))
    return found
