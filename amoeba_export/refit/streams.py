"""What goes through the layers, batch by batch: in memory where a bound allows it, else on disk. The same numbers."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch

from amoeba_export.ir import SILENT, Progress
from amoeba_export.model.states import StateFile


class Room:
    """Makes streams over the same batches, and knows how much of the bound they take.

    Args:
        folder: Where those lie that do not fit.
        batches: [B, T] of each batch.
        memory_bytes: What all streams may take in memory.
        device: Where they are read to.
        progress: Told of a file that is not what was written.
    """

    def __init__(
        self,
        folder: Path,
        batches: Sequence[tuple[int, ...]],
        *,
        memory_bytes: int,
        device: torch.device,
        progress: Progress = SILENT,
    ) -> None:
        self.folder, self.batches, self.device, self.progress = folder, batches, device, progress
        self.free_bytes = memory_bytes

    def stream(self, name: str, width: int, *, sealed: bool = True) -> Stream:
        """A stream of [B, T, width], written or not. On disk it is called `name`, and found there by a later process.

        Args:
            name: Of the file.
            width: Channels of a token.
            sealed: Whether another process may go on from it.
        """
        return Stream(self, name, width, sealed=sealed)


class Stream:
    """One tensor per batch. See `Room.stream`."""

    def __init__(self, room: Room, name: str, width: int, *, sealed: bool) -> None:
        shapes = [(*batch, width) for batch in room.batches]
        self._room = room
        self._size_bytes = 4 * sum(map(math.prod, shapes))
        self._file = StateFile(room.folder / f"{name}.f32", shapes, sealed=sealed, progress=room.progress)
        self._held: list[torch.Tensor] | None = None

    @property
    def is_in_memory(self) -> bool:
        """Whether it was written, and fitted."""
        return self._held is not None

    @property
    def is_on_disk(self) -> bool:
        """Whether its file is there, and is what was written."""
        return self._held is None and self._file.exists

    def write(self, batches: Iterable[torch.Tensor]) -> None:
        """Take in all batches, in order."""
        assert self._held is None, "a stream is written once"
        if self._size_bytes > self._room.free_bytes:
            self._file.write(batches)
            return
        self._room.free_bytes -= self._size_bytes
        self._held = list(batches)

    def read(self, batch_idx: int) -> torch.Tensor:
        """One batch. [B, T, width]."""
        if self._held is not None:
            return self._held[batch_idx]
        return self._file.read(batch_idx).to(self._room.device)

    def take(self, batch_idx: int) -> torch.Tensor:
        """One batch, for the last time: memory lets go of it."""
        batch = self.read(batch_idx)
        if self._held is not None:
            self._held[batch_idx] = batch.new_empty(0)
        return batch

    def remove(self) -> None:
        """Let go of the memory or the disk."""
        if self._held is not None:
            self._room.free_bytes += self._size_bytes
            self._held = None
        else:
            self._file.remove()
