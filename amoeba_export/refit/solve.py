"""Ridge least squares for one writer into the residual stream, its strength chosen on held-out tokens.

C kept input channels, D hidden, T tokens. Minimizes ||y - W x - dW x - b||^2 + strength * d * ||dW||^2 over dW and b,
d being the mean diagonal of the Gram matrix. The penalty is on the change: what the data does not show stays as it was.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from amoeba_export.refit.gram import PANEL, NormalEquations


class Tokens(NamedTuple):
    """What enters a writer, what it should add, and how much each token counts."""

    x_TC: torch.Tensor
    y_TD: torch.Tensor
    weight_T: torch.Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Solution:
    """What a writer computes after the fit.

    Attributes:
        w_DC: Its weight, fp32.
        bias_D: Its bias, fp32, or None where the plan has none.
        strength: Of the ridge; None where the weight stays as it was.
        before, after: Held-out squared error relative to the energy of what is aimed at.
    """

    w_DC: torch.Tensor
    bias_D: torch.Tensor | None
    strength: float | None
    before: float
    after: float


def solve_bytes(num_inputs: int, num_outputs: int) -> int:
    """What the sums and a solve take at most: half a Gram matrix, a factor, and maps of inputs to outputs."""
    return 12 * num_inputs**2 + 28 * num_inputs * num_outputs


def solve_writer(
    normal: NormalEquations,
    w_DC: torch.Tensor,
    *,
    bias_D: torch.Tensor | None,
    strengths: Sequence[float],
    heldout: Tokens,
    added: Callable[[torch.Tensor], torch.Tensor] | None = None,
) -> Solution:
    """The best of `strengths` on the held-out tokens, or the weight as it is where none lowers their error.

    Args:
        normal: Sums over the tokens that are fitted.
        w_DC: The kept columns of the weight.
        bias_D: The bias that it has now; None where the plan has no bias, and none is fitted.
        strengths: Tried in order; the first of equals wins.
        heldout: Tokens that choose the strength. They aim at what is added to the stream.
        added: What a norm behind the writer makes of its output; None where the output is added as it is.
    """

    def error(w: torch.Tensor, bias: torch.Tensor | None) -> float:
        if added is None:
            left_TD = heldout.y_TD - heldout.x_TC @ w.T
            if bias is not None:
                left_TD -= bias
        else:
            written_TD = heldout.x_TC @ w.T
            left_TD = heldout.y_TD - added(written_TD if bias is None else written_TD + bias)
        return float((left_TD.square().sum(dim=1) * heldout.weight_T).sum(dtype=torch.float64))

    energy = max(float((heldout.y_TD.square().sum(dim=1) * heldout.weight_T).sum(dtype=torch.float64)), 1e-30)
    before = error(w_DC, bias_D)
    best = Solution(w_DC=w_DC, bias_D=bias_D, strength=None, before=before / energy, after=before / energy)
    cross_CD = normal.reduce(w_DC, centre=bias_D is not None)
    scale = float(normal.diagonal().mean()) if normal.num_inputs else 0.0
    for strength in strengths if scale > 0 else ():
        factor_CC = normal.factor(strength * scale)
        if factor_CC is None:
            continue
        fitted_DC = _changed(w_DC, factor_CC, cross_CD)
        del factor_CC
        fitted_D = None if bias_D is None else normal.intercept(fitted_DC).float()
        after = error(fitted_DC, fitted_D) / energy
        if after < best.after:
            best = Solution(w_DC=fitted_DC, bias_D=fitted_D, strength=strength, before=best.before, after=after)
    if best.strength is None and bias_D is not None:
        mean_D = normal.intercept(w_DC).float()
        after = error(w_DC, mean_D) / energy
        if after < best.after:
            best = Solution(w_DC=w_DC, bias_D=mean_D, strength=None, before=best.before, after=after)
    return best


def _changed(w_DC: torch.Tensor, factor_CC: torch.Tensor, cross_CD: torch.Tensor) -> torch.Tensor:
    """`w_DC` with the solution added, in fp32; some outputs at a time, so that no second [C, D] is made in float64."""
    fitted_DC = torch.empty_like(w_DC, memory_format=torch.contiguous_format)
    for start in range(0, len(w_DC), PANEL):
        outputs = slice(start, start + PANEL)
        change_CP = torch.linalg.solve_triangular(factor_CC, cross_CD[:, outputs], upper=False)
        change_CP = torch.linalg.solve_triangular(factor_CC.T, change_CP, upper=True)
        fitted_DC[outputs] = w_DC[outputs].double() + change_CP.T
    return fitted_DC
