"""A model's weights with its adapters merged for one plan, as a source of weights like any other."""

from __future__ import annotations

from collections.abc import Collection

import torch

from amoeba_export.ir import Adapter, SubnetPlan, Supernet
from amoeba_export.model.merge import cut_and_merge


class MergedTensors:
    """A `TensorSource`: `W + delta` at full size, in fp32, where an adapter changes a weight.

    Args:
        supernet: With its adapters.
        plan: The gate of a shape-aware mixture is asked for this plan.
    """

    def __init__(self, supernet: Supernet, plan: SubnetPlan) -> None:
        self._supernet, self._plan = supernet, plan

    def names(self) -> Collection[str]:
        """Every weight there is."""
        return self._supernet.tensors.names()

    def shape(self, name: str) -> tuple[int, ...]:
        """From the header alone."""
        return self._supernet.tensors.shape(name)

    def dtype(self, name: str) -> torch.dtype:
        """Of what `read` gives."""
        return torch.float32 if self._changing(name) else self._supernet.tensors.dtype(name)

    def read(self, name: str) -> torch.Tensor:
        """The weight, adapters applied in order."""
        weight = self._supernet.tensors.read(name)
        module = name.removesuffix(".weight")
        deltas = [delta for adapter in self._changing(name) if (delta := adapter.delta(module, self._plan)) is not None]
        return cut_and_merge(weight, None, None, deltas, torch.float32) if deltas else weight

    def _changing(self, name: str) -> list[Adapter]:
        module = name.removesuffix(".weight")
        return [a for a in self._supernet.adapters if name.endswith(".weight") and module in a.modules()]
