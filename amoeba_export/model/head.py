"""From final hidden states to the score of each sample, looking at no logit that does not count.

V vocabulary, S scored positions, C choices of a question, D hidden.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from amoeba_export.ir.metric import Mode, ObjectiveName, mode_of
from amoeba_export.model.layers import LayerStack
from amoeba_export.model.samples import Batch, Samples

if TYPE_CHECKING:
    from numpy.typing import NDArray

LOGIT_BYTES = 256 * 2**20
"""Logits in memory at once; for larger vocabularies, rows of the head are taken in blocks."""
MIN_BLOCK = 1024
"""Rows of the head that are taken at least."""


class Head:
    """The vocabulary head of a supernet; its rows stay in memory when the layers do."""

    def __init__(self, stack: LayerStack) -> None:
        self._stack = stack
        self._name = stack.head_name()
        self._resident_VD = stack.tensors.read(self._name).to(torch.float32, copy=True) if stack.is_resident else None

    def _weight(self) -> torch.Tensor:
        return self._stack.tensors.read(self._name) if self._resident_VD is None else self._resident_VD

    def scores(self, batch: Batch, hidden_BTD: torch.Tensor, objective: ObjectiveName) -> NDArray[np.float64]:
        """One number per segment: summed negative log-likelihood, or 1 for a right answer and 0 for a wrong one."""
        hidden_SD = self._stack.norm(hidden_BTD[batch.rows_S, batch.positions_S])
        score = self._right_answers if objective == "accuracy" else self._surprise
        totals = torch.zeros(batch.num_segments, dtype=torch.float64)
        return totals.index_add_(0, batch.segments_S, score(batch, hidden_SD).double()).numpy()

    def _surprise(self, batch: Batch, hidden_SD: torch.Tensor) -> torch.Tensor:
        """-log p(target) at each scored position. [S]."""
        weight_VD = self._weight()
        vocab_size, num_scored = weight_VD.shape[0], hidden_SD.shape[0]
        block = max(MIN_BLOCK, LOGIT_BYTES // (4 * num_scored))
        self._stack.work.head_logits += vocab_size * num_scored
        log_total_S = torch.full((num_scored,), -torch.inf)
        right_S = self._stack.logits((hidden_SD * weight_VD[batch.targets_S].to(torch.float32)).sum(dim=1))
        for start in range(0, vocab_size, block):
            logits_SV = self._stack.logits(hidden_SD @ weight_VD[start : start + block].to(torch.float32).T)
            log_total_S = torch.logaddexp(log_total_S, logits_SV.logsumexp(dim=1))
        # Two ways to the same logit may differ in the last bit; a probability is never above 1.
        return (log_total_S - right_S).clamp_min(0.0)

    def _right_answers(self, batch: Batch, hidden_SD: torch.Tensor) -> torch.Tensor:
        """1 where the right choice has the highest logit among the choices, the first of equals counting. [S]."""
        assert batch.choices_SC is not None, "accuracy is asked of multiple-choice samples only"
        rows_SCD = self._weight()[batch.choices_SC.clamp_min(0)].to(torch.float32)
        self._stack.work.head_logits += rows_SCD.shape[0] * rows_SCD.shape[1]
        logits_SC = self._stack.logits(torch.einsum("sd,scd->sc", hidden_SD, rows_SCD))
        if bool(logits_SC.isnan().any()):
            return torch.full((hidden_SD.shape[0],), torch.nan)
        logits_SC = logits_SC.masked_fill(batch.choices_SC < 0, -torch.inf)
        chosen_S = batch.choices_SC.gather(1, logits_SC.argmax(dim=1, keepdim=True)).squeeze(1)
        return (chosen_S == batch.targets_S).double()


class Objective:
    """How scores of samples make one metric.

    Args:
        name: `loss` (mean negative log-likelihood per token), `perplexity` (its exponential) or `accuracy`.
        samples: What is scored: it says what sums are divided by.
    """

    def __init__(self, name: ObjectiveName, samples: Samples) -> None:
        self.name = name
        self.mode: Mode = mode_of(name)
        self.num_segments = samples.num_segments
        self._total = samples.num_scored

    def value(self, scores: Sequence[float]) -> float:
        """The metric of the scores of all segments. Sums are exactly rounded: they never fall when a score is added."""
        return self._of_sum(math.fsum(scores))

    def at_best(self, scores: Sequence[float]) -> float:
        """The best that the metric can become after these scores: none is negative, and no answer more than right."""
        unseen = self.num_segments - len(scores) if self.name == "accuracy" else 0
        return self._of_sum(math.fsum(scores) + unseen)

    def _of_sum(self, total: float) -> float:
        mean = total / self._total
        if self.name != "perplexity":
            return mean
        with np.errstate(over="ignore"):
            return float(np.exp(mean))
