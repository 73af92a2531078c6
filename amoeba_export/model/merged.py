"""A model's weights with its adapters merged for one plan, or as a refit left them, as sources like any other."""

from __future__ import annotations

from collections.abc import Collection

import torch

from amoeba_export.ir import Adapter, SubnetPlan, Supernet, TensorSource
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


class RefittedTensors:
    """A `TensorSource`: what lies outside the layers is what a refit made of it, where it made something.

    Args:
        tensors: The weights otherwise. Layers are not looked up in the refit, which counts those of the cut.
        supernet: With its refit.
        plan: That the refit is of.
    """

    def __init__(self, tensors: TensorSource, supernet: Supernet, plan: SubnetPlan) -> None:
        self._tensors, self._family = tensors, supernet.family
        refit = supernet.refit_of(plan)
        self._refit = None if refit is None else refit.tensors
        self._refitted = (
            frozenset[str]() if refit is None else frozenset(filter(self._is_outside, refit.tensors.names()))
        )

    def names(self) -> Collection[str]:
        """Every weight there is."""
        return self._tensors.names()

    def shape(self, name: str) -> tuple[int, ...]:
        """From the header alone."""
        return self._tensors.shape(name)

    def dtype(self, name: str) -> torch.dtype:
        """Of what `read` gives."""
        return self._source(name).dtype(name)

    def read(self, name: str) -> torch.Tensor:
        """The weight."""
        return self._source(name).read(name)

    def _source(self, name: str) -> TensorSource:
        return self._refit if self._refit is not None and name in self._refitted else self._tensors

    def _is_outside(self, name: str) -> bool:
        place = self._family.find(name)
        return place is not None and place.layer is None
