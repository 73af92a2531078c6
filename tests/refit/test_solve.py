from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from amoeba_export.refit.gram import NormalEquations
from amoeba_export.refit.solve import Solution, Tokens, solve_bytes, solve_writer

C, D, T = 700, 5, 900
CPU = torch.device("cpu")


def tokens(seed: int, count: int = T) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs with a mean, and outputs that are a linear map of them with a bias and noise."""
    x_TC = torch.randn(count, C, generator=torch.Generator().manual_seed(seed)) + 0.3
    w_DC = torch.randn(D, C, generator=torch.Generator().manual_seed(7))
    noise_TD = torch.randn(count, D, generator=torch.Generator().manual_seed(seed + 1))
    return x_TC, x_TC @ w_DC.T + 2.0 + 0.1 * noise_TD


def collected(x_TC: torch.Tensor, y_TD: torch.Tensor, weight_T: torch.Tensor | None = None) -> NormalEquations:
    weight_T = torch.ones(len(x_TC)) if weight_T is None else weight_T
    normal = NormalEquations(x_TC.shape[1], y_TD.shape[1], CPU)
    for start in range(0, len(x_TC), 256):
        normal.add(x_TC[start : start + 256], y_TD[start : start + 256], weight_T[start : start + 256])
    return normal


def test_sums_over_blocks_are_those_of_all_tokens() -> None:
    x_TC, y_TD = tokens(0)
    w_DC = torch.randn(D, C)
    normal = collected(x_TC, y_TD)
    cross_CD, gram_CC = normal.reduce(w_DC, centre=True), normal.dense()
    x, y = x_TC.double() - x_TC.double().mean(0), y_TD.double() - y_TD.double().mean(0)
    torch.testing.assert_close(gram_CC, x.T @ x, rtol=1e-5, atol=1e-2)
    torch.testing.assert_close(cross_CD, x.T @ (y - x @ w_DC.double().T), rtol=1e-4, atol=1e-1)


@pytest.mark.parametrize("has_bias", [True, False])
def test_the_solution_is_that_of_the_augmented_least_squares_problem(has_bias: bool) -> None:
    """The ridge as extra rows, solved by QR: another way to the same minimum."""
    x_TC, y_TD = tokens(0)
    w_DC, strength = 0.1 * torch.randn(D, C, generator=torch.Generator().manual_seed(3)), 0.1
    held_x, held_y = tokens(5, 200)
    bias_D = torch.zeros(D) if has_bias else None
    found = solve_writer(
        collected(x_TC, y_TD),
        w_DC,
        bias_D=bias_D,
        strengths=[strength],
        heldout=Tokens(held_x, held_y, torch.ones(200)),
    )
    x, y = x_TC.double(), (y_TD - x_TC @ w_DC.T).double()
    if has_bias:
        x, y = x - x.mean(0), y - y.mean(0)
    scale = float((x.T @ x).diagonal().mean())
    rows = torch.cat([x, (strength * scale) ** 0.5 * torch.eye(C, dtype=torch.float64)])
    change_CD = torch.linalg.lstsq(rows, torch.cat([y, torch.zeros(C, D, dtype=torch.float64)])).solution
    expected_DC = w_DC + change_CD.T.float()
    torch.testing.assert_close(found.w_DC, expected_DC, rtol=1e-3, atol=1e-4)
    assert found.strength == strength and found.after < found.before
    if has_bias:
        assert found.bias_D is not None
        torch.testing.assert_close(found.bias_D, (y_TD - x_TC @ expected_DC.T).mean(0), rtol=1e-3, atol=1e-3)
    else:
        assert found.bias_D is None


def test_the_strength_that_is_best_on_held_out_tokens_is_taken() -> None:
    """Fewer tokens than channels and noise for a target: the more the ridge holds back, the better."""
    x_TC, _ = tokens(0, 300)
    noise_TD = torch.randn(300, D, generator=torch.Generator().manual_seed(2))
    held_x, _ = tokens(9, 400)
    held_y = torch.randn(400, D, generator=torch.Generator().manual_seed(4))
    w_DC = torch.zeros(D, C)

    def solve(strengths: list[float]) -> Solution:
        return solve_writer(
            collected(x_TC, noise_TD),
            w_DC,
            bias_D=None,
            strengths=strengths,
            heldout=Tokens(held_x, held_y, torch.ones(400)),
        )

    kept = solve([1e-4, 1e-2])
    assert kept.strength is None and torch.equal(kept.w_DC, w_DC) and kept.after == kept.before == 1.0


def test_a_norm_behind_the_writer_is_seen_by_the_judge() -> None:
    """Noise for a target: the fit is shorter, so nearer to it, until a norm makes every output as long as before."""
    x_TC, _ = tokens(0, 3000)
    noise_TD = torch.randn(3000, D, generator=torch.Generator().manual_seed(2))
    held_x, _ = tokens(9, 400)
    w_DC = torch.randn(D, C, generator=torch.Generator().manual_seed(7))

    def norm(written_TD: torch.Tensor) -> torch.Tensor:
        return written_TD / written_TD.square().mean(dim=1, keepdim=True).sqrt()

    held_y = norm(held_x @ w_DC.T)  # what the weight gives already
    found = [
        solve_writer(
            collected(x_TC, noise_TD),
            w_DC,
            bias_D=None,
            strengths=[1e-4],
            heldout=Tokens(held_x, held_y, torch.ones(400)),
            added=added,
        )
        for added in (norm, None)
    ]
    assert found[0].strength is None and found[0].before == pytest.approx(0.0, abs=1e-9)
    assert found[1].strength == 1e-4, "without a norm, the short one is nearer"


def test_a_block_without_inputs_keeps_a_bias_alone() -> None:
    _, y_TD = tokens(0)
    held_x, held_y = tokens(3, 200)
    found = solve_writer(
        collected(torch.zeros(T, 0), y_TD),
        torch.zeros(D, 0),
        bias_D=torch.zeros(D),
        strengths=[0.1],
        heldout=Tokens(held_x[:, :0], held_y, torch.ones(200)),
    )
    assert found.bias_D is not None and found.w_DC.shape == (D, 0)
    torch.testing.assert_close(found.bias_D, y_TD.mean(0))


def test_a_token_of_weight_two_counts_as_two_tokens() -> None:
    x_TC, y_TD = tokens(0)
    weight_T = torch.ones(T)
    weight_T[:100] = 2.0
    weighted = collected(x_TC, y_TD, weight_T)
    repeated = collected(torch.cat([x_TC, x_TC[:100]]), torch.cat([y_TD, y_TD[:100]]))
    w_DC = torch.randn(D, C)
    found_CD, expected_CD = weighted.reduce(w_DC, centre=True), repeated.reduce(w_DC, centre=True)
    torch.testing.assert_close(found_CD, expected_CD, rtol=1e-4, atol=1e-1)
    torch.testing.assert_close(weighted.dense(), repeated.dense(), rtol=1e-4, atol=1e-1)
    torch.testing.assert_close(weighted.intercept(w_DC), repeated.intercept(w_DC), rtol=1e-5, atol=1e-4)


def test_a_solve_takes_no_more_memory_than_is_set_aside_for_it() -> None:
    """In a process of its own, at a scale where a second Gram matrix or cross product would show."""
    script = """
import resource, torch
from amoeba_export.refit.gram import NormalEquations
from amoeba_export.refit.solve import Tokens, solve_writer
C, D, T = 4096, 1024, 512
x, y, w = torch.randn(T, C), torch.randn(T, D), torch.zeros(D, C)
warm = NormalEquations(600, 8, torch.device("cpu"))
warm.add(x[:, :600], y[:, :8], torch.ones(T))
args = dict(bias_D=torch.zeros(8), strengths=[0.1], heldout=Tokens(x[:, :600], y[:, :8], torch.ones(T)))
solve_writer(warm, w[:8, :600].contiguous(), **args)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
normal = NormalEquations(C, D, torch.device("cpu"))
normal.add(x, y, torch.ones(T))
args = dict(bias_D=torch.zeros(D), strengths=[0.1, 1.0], heldout=Tokens(x, y, torch.ones(T)))
assert solve_writer(normal, w, **args).w_DC.shape == (D, C)
print(1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before))
"""
    done = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True)
    assert int(done.stdout) < solve_bytes(4096, 1024)
