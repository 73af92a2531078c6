"""What enters each layer of the full model, over the search samples: computed once, kept on disk.

Every candidate of a depth search is the full model up to its lowest removed layer, so it starts from here.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import numpy as np
import torch
from torch import nn

from amoeba_export.model.layers import LayerStack
from amoeba_export.model.samples import Samples

Observe = Callable[[int, nn.Module], AbstractContextManager[None]]
"""Called around the forwards of one layer, with its index and its module."""


class StateStore:
    """Boundary b is the input of layer b, and boundary L the output of the last layer. Boundary 0 is never stored.

    Files appear in one rename, so a process that is killed leaves none half-written, and the next one goes on from
    those that are there.

    Args:
        stack: The model.
        samples: What goes through it.
        folder: Where the files lie: fp32, the batches one after another.
        limit_bytes: Every `stride`-th boundary is kept, with the smallest stride for which these and the boundaries
            between two of them fit. The others are computed again when asked for: once each, by a search, which goes
            from the last layer to the first.
    """

    def __init__(self, stack: LayerStack, samples: Samples, folder: Path, *, limit_bytes: int) -> None:
        self._stack = stack
        self._samples = samples
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        hidden_size = stack.architecture.hidden_size
        self.num_layers = stack.architecture.num_layers
        self._shapes = [(*batch.tokens_BT.shape, hidden_size) for batch in samples.batches]
        self._offsets = [0]
        for shape in self._shapes:
            self._offsets.append(self._offsets[-1] + 4 * math.prod(shape))
        self.boundary_bytes = self._offsets[-1]
        self.stride = _stride(self.num_layers, self.boundary_bytes, limit_bytes)

    def _path(self, boundary: int) -> Path:
        return self._folder / f"boundary-{boundary:04d}.f32"

    def nearest(self, boundary: int) -> int:
        """The highest boundary at or below `boundary` that can be read without computing a layer."""
        return next(b for b in range(boundary, -1, -1) if b == 0 or self._path(b).is_file())

    def read(self, boundary: int, batch_idx: int) -> torch.Tensor:
        """One batch at a boundary that is there. [B, T, D]."""
        if boundary == 0:
            return self._stack.embed(self._samples.batches[batch_idx].tokens_BT)
        shape = self._shapes[batch_idx]
        values = np.fromfile(
            self._path(boundary), dtype=np.float32, count=math.prod(shape), offset=self._offsets[batch_idx]
        )
        return torch.from_numpy(values).view(shape)

    def prepare(self, boundary: int) -> None:
        """Make `boundary` readable, computing from the nearest one below it if it must."""
        segment = range(boundary // self.stride * self.stride, boundary + 1)
        for layer_idx in range(self.nearest(boundary), boundary):
            self._advance(layer_idx)
            for b in range(1, self.num_layers + 1):
                if b % self.stride and b not in segment and b != layer_idx + 1:
                    self._path(b).unlink(missing_ok=True)

    def sweep(self, observe: Observe | None = None, *, first: int = 0) -> Iterator[int]:
        """Go through all layers from `first` on, and yield each layer index when its output is stored.

        Needs layers below `first` to have been swept before. Layers that `observe` is called for are run even if their
        output is there already.
        """
        for layer_idx in range(self.nearest(first), self.num_layers):
            self._advance(layer_idx, observe if layer_idx >= first else None)
            if layer_idx % self.stride and layer_idx:
                self._path(layer_idx).unlink(missing_ok=True)
            yield layer_idx

    @torch.no_grad()
    def _advance(self, layer_idx: int, observe: Observe | None = None) -> None:
        """Run one layer over everything."""
        module = self._stack.layer(layer_idx)
        part = self._path(layer_idx + 1).with_suffix(".part")
        watch = observe(layer_idx, module) if observe else contextlib.nullcontext()
        with watch, part.open("wb") as file:
            for batch_idx in range(len(self._samples.batches)):
                hidden_BTD = self._stack.run(module, self.read(layer_idx, batch_idx))
                hidden_BTD.numpy().tofile(file)
        part.replace(self._path(layer_idx + 1))


def _stride(num_layers: int, boundary_bytes: int, limit_bytes: int) -> int:
    """The smallest stride that fits; where none does, the one that takes least."""
    held = {stride: num_layers // stride + stride - 1 for stride in range(1, num_layers + 1)}
    fitting = [stride for stride, count in held.items() if count * boundary_bytes <= limit_bytes]
    return fitting[0] if fitting else min(held, key=lambda stride: held[stride])
