"""Error-compensated rounding against the algorithm written down plainly, and against rounding to nearest."""

from __future__ import annotations

import pytest
import torch

from amoeba_export.ir.rounded import Grid
from amoeba_export.refit.gptq import DAMPING, best_steps, factor_inverse, round_blocks, round_matrix

GENERATOR = torch.Generator()


def problem(rows: int = 24, columns: int = 96, tokens: int = 400) -> tuple[torch.Tensor, torch.Tensor]:
    """A matrix and inputs whose channels go together: a few directions have most of the energy."""
    generator = GENERATOR.manual_seed(0)
    w_OC = torch.randn(rows, columns, generator=generator)
    few_TK = torch.randn(tokens, 12, generator=generator)
    x_TC = few_TK @ torch.randn(12, columns, generator=generator) + 0.3 * torch.randn(
        tokens, columns, generator=generator
    )
    return w_OC, x_TC


def plainly(w_OC: torch.Tensor, gram_CC: torch.Tensor, grid: Grid) -> torch.Tensor:
    """Column by column: round, spread the error by the inverse of what is left of the Gram matrix, drop the column."""
    w_OC, columns = w_OC.double().clone(), w_OC.shape[1]
    hessian = gram_CC.double() + DAMPING * gram_CC.diagonal().mean() * torch.eye(columns, dtype=torch.float64)
    result = torch.zeros_like(w_OC)
    for column in range(columns):
        if column % grid.block_size == 0:
            block = slice(column, column + grid.block_size)
            left = [torch.linalg.inv(hessian[i:, i:])[0, 0] for i in range(column, min(block.stop, columns))]
            step_O, offset_O = best_steps(w_OC[:, block].float(), 1 / torch.stack(left).float(), grid)
        code_O = ((w_OC[:, column] - offset_O) / step_O).round().clamp(0, 15)
        result[:, column] = code_O * step_O + offset_O
        inverse = torch.linalg.inv(hessian[column:, column:])
        error_O = (w_OC[:, column] - result[:, column]) / inverse[0, 0]
        w_OC[:, column:] -= error_O[:, None] * inverse[0][None]
    return result.float()


@pytest.mark.parametrize("has_offsets", [False, True])
def test_it_is_the_algorithm_of_the_paper(has_offsets: bool) -> None:
    w_OC, x_TC = problem(columns=80)
    gram_CC = (x_TC.T @ x_TC).double()
    grid = Grid(block_size=32, has_offsets=has_offsets, step_dtype="fp32")
    expected = plainly(w_OC, gram_CC, grid)
    found = round_matrix(w_OC, factor_inverse(gram_CC.clone()), grid).values()
    same = (found - expected).abs() < 1e-4
    assert same.float().mean() > 0.98  # fp32 tips a few values that lie between two levels, and then those after them


@pytest.mark.parametrize("has_offsets", [False, True])
@pytest.mark.parametrize("columns", [96, 80, 33])
def test_outputs_lose_less_than_half_of_what_rounding_to_nearest_loses(columns: int, has_offsets: bool) -> None:
    w_OC, x_TC = problem(columns=columns)
    grid = Grid(block_size=32, has_offsets=has_offsets, step_dtype="fp32")
    given = w_OC.clone()
    rounded = round_matrix(w_OC, factor_inverse((x_TC.T @ x_TC).double()), grid)
    torch.testing.assert_close(w_OC, given, rtol=0, atol=0)  # not written into
    nearest = round_matrix(w_OC, torch.eye(columns), grid)
    lost, lost_nearest = (float(((one.values() - w_OC) @ x_TC.T).square().mean()) for one in (rounded, nearest))
    assert lost < 0.5 * lost_nearest
    assert rounded.codes_OC.max() <= 15
    assert rounded.steps_OG.shape == (24, -(-columns // 32))
    if not has_offsets:
        torch.testing.assert_close(rounded.offsets_OG, -8 * rounded.steps_OG)


def test_channels_without_inputs_and_rows_of_zeros() -> None:
    w_OC, x_TC = problem()
    x_TC[:, 7] = 0
    w_OC[3] = 0
    found = round_matrix(
        w_OC, factor_inverse((x_TC.T @ x_TC).double()), Grid(block_size=32, has_offsets=False, step_dtype="fp32")
    ).values()
    assert torch.isfinite(found).all()
    assert not found[3].any()
    assert (found[:, 7] - w_OC[:, 7]).abs().max() < 1.0
    alone = factor_inverse(torch.zeros(4, 4, dtype=torch.float64))
    assert torch.isfinite(alone).all()


def test_linearly_dependent_inputs_have_a_factor() -> None:
    x_TC = torch.ones(10, 1).double() @ torch.ones(1, 64).double()
    assert torch.isfinite(factor_inverse(x_TC.T @ x_TC)).all()


@pytest.mark.parametrize(
    "grid",
    [
        Grid(block_size=32, has_offsets=False, step_dtype="fp16"),
        Grid(block_size=96, has_offsets=False, step_dtype="bf16"),
        Grid(block_size=96, has_offsets=True, whole_zeros=True, step_dtype="bf16"),
    ],
)
def test_steps_and_zeros_are_those_that_a_format_stores(grid: Grid) -> None:
    w_OC, x_TC = problem()
    rounded = round_matrix(w_OC + 0.3, factor_inverse((x_TC.T @ x_TC).double()), grid)
    kind = {"fp16": torch.float16, "bf16": torch.bfloat16}[grid.step_dtype]
    assert torch.equal(rounded.steps_OG, rounded.steps_OG.to(kind).float())
    zeros_OG = -rounded.offsets_OG / rounded.steps_OG
    assert torch.equal(zeros_OG, zeros_OG.round())
    assert bool(((zeros_OG >= 0) & (zeros_OG <= 15)).all())
    error = ((rounded.values() - w_OC - 0.3) @ x_TC.T).square().mean() / ((w_OC + 0.3) @ x_TC.T).square().mean()
    assert error < 0.01


def test_weights_too_small_for_a_step_become_zeros() -> None:
    w_OC, x_TC = problem(columns=32)
    grid = Grid(block_size=32, has_offsets=False, step_dtype="fp16")
    rounded = round_matrix(w_OC * 1e-12, factor_inverse((x_TC.T @ x_TC).double()), grid)
    assert not bool(rounded.values().any())


class Remembering:
    """Rounds to whole numbers, and remembers what it was told to count."""

    block_size, kind = 32, 8

    def quantize(self, w_OI: torch.Tensor, importance_I: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        self.importance_I = importance_I
        return w_OI.round().to(torch.uint8), w_OI.round()


@pytest.mark.parametrize("columns", [96, 80])
def test_errors_count_by_the_size_of_the_inputs(columns: int) -> None:
    w_OC, x_TC = problem(columns=columns)
    x_TC[:, 3] = 0
    square_C, quantizer = x_TC.square().mean(0), Remembering()
    rounded = round_blocks(w_OC, square_C.double(), quantizer)
    assert rounded.packed_ON.shape == (24, 96)
    assert torch.equal(rounded.values(), w_OC.round())
    assert quantizer.importance_I.shape == (96,)
    assert bool((quantizer.importance_I > 0).all())
    torch.testing.assert_close(quantizer.importance_I[:columns] - quantizer.importance_I[3], square_C)
