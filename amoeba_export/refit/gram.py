"""Normal equations of a linear map, collected over tokens that come in blocks: Gram matrix, cross product, means.

C input channels, D outputs, T tokens.
"""

from __future__ import annotations

import torch

PANEL = 512
"""Columns of the Gram matrix that are made at once. It is symmetric: what lies above the diagonal is not computed."""


class NormalEquations:
    """Weighted sums over tokens of x x', x y', x and y, in float64.

    Products of one block are fp32, as its values are; sums over blocks are float64.

    Args:
        num_inputs: C.
        num_outputs: D.
        device: Where the sums are.

    Attributes:
        count: Sum of the weights.
        gram_CC: Sum of x x'. Only the lower triangle is filled, by panels; `centred` completes it.
        cross_CD: Sum of x y'.
        sum_C, sum_D: Sums of x and y.
    """

    def __init__(self, num_inputs: int, num_outputs: int, device: torch.device) -> None:
        self.count = 0.0
        self.gram_CC = torch.zeros(num_inputs, num_inputs, dtype=torch.float64, device=device)
        self.cross_CD = torch.zeros(num_inputs, num_outputs, dtype=torch.float64, device=device)
        self.sum_C = torch.zeros(num_inputs, dtype=torch.float64, device=device)
        self.sum_D = torch.zeros(num_outputs, dtype=torch.float64, device=device)

    def add(self, x_TC: torch.Tensor, y_TD: torch.Tensor, weight_T: torch.Tensor) -> None:
        """Take in a block of tokens, fp32."""
        self.count += float(weight_T.sum(dtype=torch.float64))
        self.sum_C += (x_TC * weight_T[:, None]).sum(dim=0, dtype=torch.float64)
        self.sum_D += (y_TD * weight_T[:, None]).sum(dim=0, dtype=torch.float64)
        root_T1 = weight_T.sqrt()[:, None]
        x_TC, y_TD = x_TC * root_T1, y_TD * root_T1
        for start in range(0, x_TC.shape[1], PANEL):
            panel = slice(start, start + PANEL)
            self.gram_CC[start:, panel] += x_TC[:, start:].T @ x_TC[:, panel]
        self.cross_CD += x_TC.T @ y_TD

    def reduce(self, w_DC: torch.Tensor, *, centre: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """What is left to explain after `w_DC` x: (gram_CC, cross_CD of the residual y - W x), about the means or zero.

        The Gram matrix is completed and centred in place: call this once.
        """
        lower = torch.tril(self.gram_CC, -1)
        self.gram_CC.tril_().add_(lower.T)
        del lower
        if centre and self.count:
            self.gram_CC.addr_(self.sum_C, self.sum_C, alpha=-1 / self.count)
            self.cross_CD.addr_(self.sum_C, self.sum_D, alpha=-1 / self.count)
        return self.gram_CC, self.cross_CD - self.gram_CC @ w_DC.T.double()

    def intercept(self, w_DC: torch.Tensor) -> torch.Tensor:
        """The bias that makes the mean of W x + b equal the mean of y. [D], float64."""
        missing_D: torch.Tensor = self.sum_D - w_DC.double() @ self.sum_C
        return missing_D / max(self.count, 1e-30)
