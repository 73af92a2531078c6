"""The weights of a file, at their places in the supernet: what the masked reference runs to check a graph alone.

Whatever the file's weights are, rounded or scaled channel by channel, its graph must compute with them what the family
computes. Everything that the plan drops is zero.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection

import torch

from amoeba_export.ir import SubnetPlan, Supernet, TensorTemplate
from amoeba_export.verify.expected import kept_mask
from amoeba_export.verify.stored import StoredWeights

HELD_BYTES = 1 << 30
"""Of weights that are kept in memory once they were read: a graph is checked in four passes over all of them, and
integers take longer to read than to multiply with. What is beyond is read in every pass."""


def with_stored_weights(supernet: Supernet, plan: SubnetPlan, stored: StoredWeights) -> tuple[Supernet, SubnetPlan]:
    """A supernet of the same dims whose weights are those of a file of `plan`, and the plan without compensation."""
    architecture = supernet.architecture
    if plan.head_tokens is not None:  # the file's head is a matrix of its own
        architecture = dataclasses.replace(architecture, tied_embeddings=False)
    tensors = _Scattered(supernet, plan, stored)
    held = dataclasses.replace(supernet, architecture=architecture, tensors=tensors, adapters=(), strategy=None)
    return held, dataclasses.replace(plan, compensate=False, refit_id=None)


class _Scattered:
    """See `TensorSource`."""

    def __init__(self, supernet: Supernet, plan: SubnetPlan, stored: StoredWeights) -> None:
        self._supernet, self._plan, self._stored = supernet, plan, stored
        family = supernet.family
        self._templates = {template.name: template for template in family.globals}
        self._places: dict[str, int] = {}
        self._in_file = set(stored.names())
        self._held: dict[str, torch.Tensor] = {}
        self._room_bytes = HELD_BYTES
        for position, kept in enumerate(plan.layers):
            for template in family.layer:
                for name in (template.name, f"{template.name.rpartition('.')[0]}.bias"):
                    source = name.format(layer=kept.source_layer)
                    if name == template.name:
                        self._templates[source] = template
                    elif source not in self._templates and name.format(layer=position) in self._in_file:
                        self._templates[source] = TensorTemplate(name=name, role=template.role, axes=template.axes[:1])
                    self._places[source] = position
        self._names = frozenset(
            (
                *(name for name in supernet.tensors.names() if not name.endswith(".bias")),
                *(name for name in self._templates if name.endswith(".bias") and self._name(name) in self._in_file),
            )
        )

    def names(self) -> Collection[str]:
        """Those of the supernet, and the biases that the file has."""
        return self._names

    def shape(self, name: str) -> tuple[int, ...]:
        """Full size."""
        return tuple(self._supernet.architecture.axis_size(axis) for axis in self._templates[name].axes)

    def dtype(self, name: str) -> torch.dtype:
        """Of what `read` gives."""
        return torch.float32

    def read(self, name: str) -> torch.Tensor:
        """The file's weight among zeros, or zeros. Not to be written to: it may be kept."""
        if name in self._held:
            return self._held[name]
        whole = self._read(name)
        if whole.nbytes <= self._room_bytes:
            self._held[name] = whole
            self._room_bytes -= whole.nbytes
        return whole

    def _read(self, name: str) -> torch.Tensor:
        shape = self.shape(name)
        if self._name(name) not in self._in_file:
            return torch.zeros(shape)
        kept = self._plan.layers[self._places[name]] if name in self._places else None
        masks = [kept_mask(axis, kept, self._supernet) for axis in self._templates[name].axes]
        if self._templates[name].role == "head" and self._plan.head_tokens is not None:
            masks[0] = torch.zeros_like(masks[0]).index_fill(0, torch.tensor(self._plan.head_tokens), True)
        values = self._stored.read(self._name(name)).of_model()
        if all(mask.all() for mask in masks):
            return values.reshape(shape)
        whole = torch.zeros(shape)
        if len(masks) == 1:
            whole[masks[0]] = values
        else:
            whole[masks[0].nonzero(), masks[1].nonzero()[:, 0]] = values
        return whole

    def _name(self, source: str) -> str:
        """What a weight of the supernet is called in the file."""
        if source not in self._places:
            return source
        kept = self._plan.layers[self._places[source]]
        return source.replace(f".{kept.source_layer}.", f".{self._places[source]}.", 1)
