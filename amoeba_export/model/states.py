"""What enters each layer of the full model, over the search samples: computed once, kept on disk.

Every candidate of a depth search is the full model up to its lowest removed layer, so it starts from here.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from torch import nn

from amoeba_export.cache.sealed import file_digest, read_sealed, write_sealed
from amoeba_export.ir import SILENT, Progress
from amoeba_export.model.layers import LayerStack
from amoeba_export.model.samples import Samples
from amoeba_export.replacing import replacing

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
        progress: Told of a file that is not what was written; it is computed again.
    """

    def __init__(
        self, stack: LayerStack, samples: Samples, folder: Path, *, limit_bytes: int, progress: Progress = SILENT
    ) -> None:
        self.stack = stack
        self.samples = samples
        self._folder = folder
        self._progress = progress
        folder.mkdir(parents=True, exist_ok=True)
        hidden_size = stack.architecture.hidden_size
        self.num_layers = stack.architecture.num_layers
        self._shapes = [(*batch.tokens_BT.shape, hidden_size) for batch in samples.batches]
        self.boundary_bytes = 4 * sum(map(math.prod, self._shapes))
        self.stride = _stride(self.num_layers, self.boundary_bytes, limit_bytes)

    def _file(self, boundary: int) -> StateFile:
        return StateFile(self._folder / f"boundary-{boundary:04d}.f32", self._shapes, progress=self._progress)

    def nearest(self, boundary: int) -> int:
        """The highest boundary at or below `boundary` that can be read without computing a layer."""
        return next(b for b in range(boundary, -1, -1) if b == 0 or self._file(b).exists)

    def read(self, boundary: int, batch_idx: int) -> torch.Tensor:
        """One batch at a boundary that is there. [B, T, D]."""
        if boundary == 0:
            return self.stack.embed(self.samples.batches[batch_idx].tokens_BT)
        return self._file(boundary).read(batch_idx)

    def prepare(self, boundary: int) -> None:
        """Make `boundary` readable, computing from the nearest one below it if it must."""
        segment = range(boundary // self.stride * self.stride, boundary + 1)
        for layer_idx in range(self.nearest(boundary), boundary):
            self._advance(layer_idx)
            for b in range(1, self.num_layers + 1):
                if b % self.stride and b not in segment and b != layer_idx + 1:
                    self._file(b).remove()

    def sweep(self, observe: Observe | None = None, *, first: int = 0) -> Iterator[int]:
        """Go through all layers from `first` on, and yield each layer index when its output is stored.

        Needs layers below `first` to have been swept before. Layers that `observe` is called for are run even if their
        output is there already.
        """
        for layer_idx in range(self.nearest(first), self.num_layers):
            self._advance(layer_idx, observe if layer_idx >= first else None)
            if layer_idx % self.stride and layer_idx:
                self._file(layer_idx).remove()
            yield layer_idx

    @torch.no_grad()
    def _advance(self, layer_idx: int, observe: Observe | None = None) -> None:
        """Run one layer over everything."""
        module = self.stack.layer(layer_idx)
        with observe(layer_idx, module) if observe else contextlib.nullcontext():
            self._file(layer_idx + 1).write(
                self.stack.run(module, self.read(layer_idx, batch_idx))
                for batch_idx in range(len(self.samples.batches))
            )


class StateFile:
    """One tensor per batch in one file: written in order, and there in whole or not at all.

    Args:
        path: Where it lies.
        shapes: Of the batches, fp32.
        sealed: Whether its sha256 is kept beside it. What no other process goes on from needs none.
        progress: Told when it is not what was written; it is removed then.
    """

    def __init__(
        self, path: Path, shapes: Sequence[tuple[int, ...]], *, sealed: bool = True, progress: Progress = SILENT
    ) -> None:
        self.path = path
        self._sealed = sealed
        self._progress = progress
        self._shapes = shapes
        self._offsets = [0]
        for shape in shapes:
            self._offsets.append(self._offsets[-1] + 4 * math.prod(shape))

    @property
    def exists(self) -> bool:
        """Whether it was written, and is what was written: it is compared with its sha256 once in a process."""
        try:
            stat = self.path.stat()
        except FileNotFoundError:
            return False
        if _is_sound(self.path, stat.st_size, stat.st_mtime_ns, stat.st_ino):
            return True
        self._progress.note(f"{self.path} is damaged; it is computed again.")
        self.remove()
        return False

    def read(self, batch_idx: int) -> torch.Tensor:
        """One batch."""
        shape = self._shapes[batch_idx]
        values = np.fromfile(self.path, dtype=np.float32, count=math.prod(shape), offset=self._offsets[batch_idx])
        return torch.from_numpy(values).view(shape)

    def write(self, batches: Iterable[torch.Tensor]) -> None:
        """Write all batches; the file appears when the last one is written."""
        digest = hashlib.sha256()
        with replacing(self.path, durable=False) as part:
            with part.open("wb") as file:
                for batch in batches:
                    content = batch.cpu().contiguous().numpy().view(np.uint8).reshape(-1).data
                    if self._sealed:
                        digest.update(content)
                    file.write(content)
            if self._sealed:
                write_sealed(_seal(self.path), digest.hexdigest().encode())

    def remove(self) -> None:
        """Let go of the disk."""
        self.path.unlink(missing_ok=True)
        _seal(self.path).unlink(missing_ok=True)


def _seal(path: Path) -> Path:
    return path.with_suffix(".sha256")


@lru_cache(maxsize=4096)
def _is_sound(path: Path, size: int, mtime_ns: int, inode: int) -> bool:
    """Whether a file has the sha256 beside it. Asked once per state of the file, which may be large."""
    known = read_sealed(_seal(path))
    return known is not None and known.decode() == file_digest(path)


def _stride(num_layers: int, boundary_bytes: int, limit_bytes: int) -> int:
    """The smallest stride that fits; where none does, the one that takes least."""
    held = {stride: num_layers // stride + stride - 1 for stride in range(1, num_layers + 1)}
    fitting = [stride for stride, count in held.items() if count * boundary_bytes <= limit_bytes]
    return fitting[0] if fitting else min(held, key=lambda stride: held[stride])
