"""How much each expert matters: what it adds to the stream, over the tokens of calibration."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from amoeba_export.model.layer import DecoderLayer
from amoeba_export.model.samples import Batch


class ExpertStatistics:
    """Of each expert, over all tokens: the mean size of what it adds (share * norm), and its mean share, in float64.

    A token that it is not picked for counts as zero. An expert that adds little when it is picked, or is hardly ever
    picked, is missed least.
    """

    def __init__(self, num_experts: int) -> None:
        self._num_tokens = 0
        self._size_E, self._share_E = np.zeros(num_experts), np.zeros(num_experts)

    @contextmanager
    def watching(self, layer: DecoderLayer, batches: Sequence[Batch]) -> Iterator[None]:
        """Take in what `layer` computes for `batches`, which come in order. Padding is left out."""
        coming, real_T = iter(batches), torch.zeros(0, dtype=torch.bool)

        def begin(_: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            nonlocal real_T
            real_BT = torch.arange(inputs[0].shape[1])[None] < next(coming).lengths_B[:, None]
            real_T = real_BT.flatten()
            self._num_tokens += int(real_T.sum())

        def heard(index: int, tokens: torch.Tensor, share_T: torch.Tensor, given_TD: torch.Tensor) -> None:
            share_T = share_T.double() * real_T[tokens]
            self._size_E[index] += float((share_T * given_TD.double().norm(dim=1)).sum())
            self._share_E[index] += float(share_T.sum())

        router: Any = layer.role("router")
        handle = router.register_forward_pre_hook(begin)
        layer.heard = heard
        try:
            yield
        finally:
            layer.heard = None
            handle.remove()

    def scores(self) -> NDArray[np.float64]:
        """Mean size of what each expert adds. [E]."""
        return self._size_E / max(self._num_tokens, 1)

    def shares(self) -> NDArray[np.float64]:
        """Mean share of each expert. [E]."""
        return self._share_E / max(self._num_tokens, 1)
