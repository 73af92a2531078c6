"""Rows and batches: a function of seed and position, so that a resumed run needs to remember nothing but its step.

B rows of a batch, T tokens of a row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from amoeba_export.finetune.data import Example
from amoeba_export.finetune.objective import IGNORED

Row = tuple[int, ...]
"""The examples of one row, by index."""


@dataclass(frozen=True, slots=True, eq=False)
class PackedBatch:
    """One micro-batch.

    Attributes:
        input_ids_BT: Tokens; 0 where there is padding, which is at the end.
        labels_BT: The token itself where it is trained on, else `IGNORED`.
        segments_BT: Which example of its row a token belongs to, counted from 1; 0 for padding.
    """

    input_ids_BT: torch.Tensor
    labels_BT: torch.Tensor
    segments_BT: torch.Tensor

    @property
    def num_tokens(self) -> int:
        """Without padding."""
        return int((self.segments_BT > 0).sum())

    def to(self, device: torch.device) -> PackedBatch:
        """The same on `device`."""
        return PackedBatch(self.input_ids_BT.to(device), self.labels_BT.to(device), self.segments_BT.to(device))


class Batches:
    """An endless sequence of micro-batches, epoch after epoch, each epoch shuffled anew.

    Args:
        examples: What there is.
        batch_size: Rows.
        max_length: Tokens of a row.
        packing: Fill rows with several examples.
        seed: Of the shuffles.
    """

    def __init__(
        self, examples: Sequence[Example], *, batch_size: int, max_length: int, packing: bool, seed: int
    ) -> None:
        self._examples = examples
        self._batch_size = batch_size
        self._max_length = max_length
        self._packing = packing
        self._seed = seed
        self._epoch, self._first, self._rows = 0, 0, self._shuffled(0)

    def at(self, index: int) -> PackedBatch:
        """The micro-batch at `index`, counted from 0 over all epochs. Rows that are left over join no batch."""
        if index < self._first:
            self._epoch, self._first, self._rows = 0, 0, self._shuffled(0)
        while index >= self._first + self._per_epoch():
            self._first += self._per_epoch()
            self._epoch += 1
            self._rows = self._shuffled(self._epoch)
        start = (index - self._first) * self._batch_size
        # Fewer rows than one batch holds: some appear twice in it
        rows = [self._rows[(start + i) % len(self._rows)] for i in range(self._batch_size)]
        return self._collated(rows)

    def epoch_of(self, index: int) -> int:
        """Which pass over the data the micro-batch belongs to, counted from 0."""
        self.at(index)
        return self._epoch

    def _per_epoch(self) -> int:
        return max(len(self._rows) // self._batch_size, 1)

    def _shuffled(self, epoch: int) -> list[Row]:
        order = np.random.default_rng([self._seed, epoch]).permutation(len(self._examples))
        if not self._packing:
            return [(int(i),) for i in order]
        return pack([len(example.tokens_T) for example in self._examples], order.tolist(), self._max_length)

    def _collated(self, rows: Sequence[Row]) -> PackedBatch:
        lengths = [sum(len(self._examples[i].tokens_T) for i in row) for row in rows]
        shape = (len(rows), max(lengths))
        input_ids_BT = np.zeros(shape, dtype=np.int64)
        labels_BT = np.full(shape, IGNORED, dtype=np.int64)
        segments_BT = np.zeros(shape, dtype=np.int64)
        for b, row in enumerate(rows):
            start = 0
            for segment, i in enumerate(row, start=1):
                example = self._examples[i]
                place = slice(start, start + len(example.tokens_T))
                input_ids_BT[b, place] = example.tokens_T
                labels_BT[b, place] = np.where(example.trained_T, example.tokens_T, IGNORED)
                segments_BT[b, place] = segment
                start = place.stop
        return PackedBatch(torch.from_numpy(input_ids_BT), torch.from_numpy(labels_BT), torch.from_numpy(segments_BT))


def pack(lengths: Sequence[int], order: Sequence[int], max_length: int, *, open_rows: int = 32) -> list[Row]:
    """Rows of at most `max_length` tokens: each example goes, in order, to the fullest open row that can take it.

    At most `open_rows` rows are open at once, the oldest closes, so that rows mix examples that are near in `order`.

    Args:
        lengths: Tokens of every example, none above `max_length`.
        order: In which they come.
        max_length: Tokens of a row.
        open_rows: Rows that wait for more.
    """
    rows: list[Row] = []
    waiting: list[tuple[list[int], int]] = []
    for i in order:
        length = lengths[i]
        fits = [slot for slot, (_, used) in enumerate(waiting) if used + length <= max_length]
        if fits:
            slot = max(fits, key=lambda slot: waiting[slot][1])
            members, used = waiting[slot]
            members.append(i)
            waiting[slot] = (members, used + length)
            continue
        if len(waiting) == open_rows:
            rows.append(tuple(waiting.pop(0)[0]))
        waiting.append(([i], length))
    return rows + [tuple(members) for members, _ in waiting]
