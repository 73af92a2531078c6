"""Normal equations of a linear map, collected over tokens that come in blocks: Gram matrix, cross product, means.

C input channels, D outputs, T tokens, P columns of a panel.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

PANEL = 512
"""Columns of the Gram matrix that are held together. It is symmetric: what lies above the panels is not held."""


class NormalEquations:
    """Weighted sums over tokens of x x', x y', x and y, in float64.

    Products of one block are fp32, as its values are; sums over blocks are float64.

    Args:
        num_inputs: C.
        num_outputs: D.
        device: Where the sums are.

    Attributes:
        count: Sum of the weights.
        panels: Of the sum of x x', by columns, each from its diagonal down. [C - start, P].
        cross_CD: Sum of x y'.
        sum_C, sum_D: Sums of x and y.
    """

    def __init__(self, num_inputs: int, num_outputs: int, device: torch.device) -> None:
        def zeros(*shape: int) -> torch.Tensor:
            return torch.zeros(*shape, dtype=torch.float64, device=device)

        self.num_inputs = num_inputs
        self.count = 0.0
        self.panels = [zeros(num_inputs - columns.start, columns.stop - columns.start) for columns in self._columns()]
        self.cross_CD = zeros(num_inputs, num_outputs)
        self.sum_C, self.sum_D = zeros(num_inputs), zeros(num_outputs)

    def _columns(self) -> Iterator[slice]:
        for start in range(0, self.num_inputs, PANEL):
            yield slice(start, min(start + PANEL, self.num_inputs))

    def add(self, x_TC: torch.Tensor, y_TD: torch.Tensor, weight_T: torch.Tensor) -> None:
        """Take in a block of tokens, fp32."""
        self.count += float(weight_T.sum(dtype=torch.float64))
        weighted_CT = (x_TC * weight_T[:, None]).T
        self.sum_C += weighted_CT.sum(dim=1)
        self.sum_D += weight_T @ y_TD
        for columns, panel in zip(self._columns(), self.panels, strict=True):
            panel += weighted_CT[columns.start :] @ x_TC[:, columns]
        self.cross_CD += weighted_CT @ y_TD

    def reduce(self, w_DC: torch.Tensor, *, centre: bool) -> torch.Tensor:
        """What is left to explain after `w_DC` x: the cross product [C, D] of x with y - W x, about the means or zero.

        The sums are centred in place: call this once.
        """
        if centre and self.count:
            for columns, panel in zip(self._columns(), self.panels, strict=True):
                panel.addr_(self.sum_C[columns.start :], self.sum_C[columns], alpha=-1 / self.count)
            self.cross_CD.addr_(self.sum_C, self.sum_D, alpha=-1 / self.count)
        w_CD = w_DC.T.double()
        for columns, panel in zip(self._columns(), self.panels, strict=True):
            self.cross_CD[columns.start :] -= panel @ w_CD[columns]
            below = slice(columns.stop, self.num_inputs)
            self.cross_CD[columns] -= panel[columns.stop - columns.start :].T @ w_CD[below]
        return self.cross_CD

    def diagonal(self) -> torch.Tensor:
        """Of the Gram matrix. [C]."""
        parts = [panel.diagonal() for panel in self.panels]
        return torch.cat(parts) if parts else self.sum_C

    def dense(self) -> torch.Tensor:
        """The Gram matrix [C, C], by columns in memory. Above the diagonal it is filled too."""
        gram_CC = self.sum_C.new_empty(self.num_inputs, self.num_inputs).T
        for columns, panel in zip(self._columns(), self.panels, strict=True):
            gram_CC[columns.start :, columns] = panel
            gram_CC[columns, columns.stop :] = panel[columns.stop - columns.start :].T
        return gram_CC

    def factor(self, ridge: float) -> torch.Tensor | None:
        """The Cholesky factor [C, C] of the Gram matrix with `ridge` on its diagonal; None where there is none."""
        gram_CC = self.dense()
        gram_CC.diagonal().add_(ridge)
        factor_CC, failed = torch.linalg.cholesky_ex(
            gram_CC, out=(gram_CC, torch.empty(0, dtype=torch.int32, device=gram_CC.device))
        )  # in place: a second one may not fit
        return None if failed else factor_CC

    def intercept(self, w_DC: torch.Tensor) -> torch.Tensor:
        """The bias that makes the mean of W x + b equal the mean of y. [D], float64."""
        missing_D: torch.Tensor = self.sum_D - w_DC.double() @ self.sum_C
        return missing_D / max(self.count, 1e-30)
