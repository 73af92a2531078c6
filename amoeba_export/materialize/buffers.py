"""Memory for large weights, used again.

A fresh block of 70 MB costs more than what is computed into it: the system hands it out page by page, each cleared and
mapped on first touch (2 GB/s, where memory in use takes 20). Small blocks are the allocator's affair.
"""

from __future__ import annotations

import math
import threading
import weakref

import numpy as np
import torch

SMALL_BYTES = 4 << 20
"""Below this the C library's allocator reuses memory by itself."""


class Buffers:
    """Makes tensors over memory of tensors that nobody holds any more.

    Whoever gets a tensor may keep it for as long as they like: its memory comes back when the tensor and every view of
    it are gone.

    Args:
        spare: Blocks kept for later use. The largest are kept.
    """

    def __init__(self, spare: int = 3) -> None:
        self._spare = spare
        self._free: list[np.ndarray[tuple[int], np.dtype[np.uint8]]] = []
        self._lock = threading.RLock()  # a tensor can die, and come back here, at any allocation: of this thread too

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """A tensor with any content."""
        size_bytes = math.prod(shape) * dtype.itemsize
        if size_bytes < SMALL_BYTES:
            return torch.empty(shape, dtype=dtype)
        with self._lock:
            # Sorted by size: the first that is large enough is the tightest.
            fitting = next((i for i, block in enumerate(self._free) if len(block) >= size_bytes), None)
            block = np.empty(size_bytes, np.uint8) if fitting is None else self._free.pop(fitting)
        lent = block[:size_bytes]
        weakref.finalize(lent, self._take_back, block).atexit = False
        return torch.from_numpy(lent).view(dtype).view(shape)

    def _take_back(self, block: np.ndarray[tuple[int], np.dtype[np.uint8]]) -> None:
        with self._lock:
            self._free = sorted([*self._free, block], key=len)[-self._spare :]
