"""What is evaluated: anything that gives logits for tokens.

B rows, T tokens, V vocabulary, P selected positions.
"""

from __future__ import annotations

from typing import Protocol

import torch


class LanguageModel(Protocol):
    """A causal language model without a cache."""

    def logits(self, input_ids_BT: torch.Tensor, select_BT: torch.Tensor) -> torch.Tensor:
        """Fp32 logits [P, V] at the selected positions, row by row. Rows are padded at their end with token 0."""


class OpenedFormat(Protocol):
    """One format of an artifact, opened by the verify stage."""

    def logits(self, input_ids: torch.Tensor) -> torch.Tensor:
        """[1, T] -> [1, T, V]."""


class ArtifactModel:
    """An exported model. Rows run one by one and unpadded, as the containers need not know padding."""

    def __init__(self, opened: OpenedFormat) -> None:
        self._opened = opened

    def logits(self, input_ids_BT: torch.Tensor, select_BT: torch.Tensor) -> torch.Tensor:
        """See `LanguageModel`."""
        rows = []
        for input_ids_T, select_T in zip(input_ids_BT, select_BT, strict=True):
            if positions := select_T.nonzero().flatten().tolist():
                # Nothing after the last wanted position can change it
                logits_TV = self._opened.logits(input_ids_T[None, : positions[-1] + 1])[0]
                rows.append(logits_TV[positions].float())
        return torch.cat(rows)
