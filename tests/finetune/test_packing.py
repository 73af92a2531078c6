from __future__ import annotations

import numpy as np
import torch

from amoeba_export.finetune.data import Example
from amoeba_export.finetune.packing import Batches, pack


def examples(*lengths: int) -> list[Example]:
    """Example i holds the token i + 1, trained on but for its first."""
    return [Example(np.full(length, i + 1, dtype=np.int32), np.arange(length) > 0) for i, length in enumerate(lengths)]


def test_packing_keeps_every_example_once_and_no_row_too_long() -> None:
    lengths = [int(n) for n in np.random.default_rng(0).integers(1, 40, 300)]
    rows = pack(lengths, list(range(300)), 64)
    assert sorted(i for row in rows for i in row) == list(range(300))
    assert all(sum(lengths[i] for i in row) <= 64 for row in rows)
    assert sum(lengths) / (64 * len(rows)) > 0.9


def test_a_batch_says_where_examples_begin_and_what_is_trained() -> None:
    batch = Batches(examples(3, 2), batch_size=1, max_length=8, packing=True, seed=0).at(0)
    order = [3, 2] if batch.input_ids_BT[0, 0] == 1 else [2, 3]
    assert batch.segments_BT.tolist() == [[1] * order[0] + [2] * order[1]]
    starts = [0, order[0]]
    assert [batch.labels_BT[0, start].item() for start in starts] == [-100, -100]
    assert (batch.labels_BT != -100).sum() == 3
    assert batch.num_tokens == 5


def test_without_packing_rows_are_padded_at_their_end() -> None:
    batch = Batches(examples(3, 1, 2), batch_size=3, max_length=8, packing=False, seed=0).at(0)
    assert batch.input_ids_BT.shape == (3, 3)
    for row, segments, labels in zip(batch.input_ids_BT, batch.segments_BT, batch.labels_BT, strict=True):
        length = int((row != 0).sum())
        assert segments.tolist() == [1] * length + [0] * (3 - length)
        assert (labels[length:] == -100).all()


def test_any_batch_can_be_asked_for_in_any_order() -> None:
    """What a resumed run relies on: batch i is the same whatever was asked before."""

    def fresh() -> Batches:
        return Batches(examples(*range(1, 20)), batch_size=2, max_length=32, packing=True, seed=3)

    forward = fresh()
    in_order = [forward.at(i).input_ids_BT for i in range(12)]
    assert forward.epoch_of(11) > 0
    for i in (11, 0, 7):
        assert torch.equal(fresh().at(i).input_ids_BT, in_order[i])
    assert torch.equal(forward.at(1).input_ids_BT, in_order[1])


def test_epochs_are_shuffled_differently_and_see_everything() -> None:
    batches = Batches(examples(*[4] * 8), batch_size=1, max_length=4, packing=False, seed=0)
    epochs = [[batches.at(epoch * 8 + i).input_ids_BT[0, 0].item() for i in range(8)] for epoch in range(2)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(1, 9))
    assert epochs[0] != epochs[1]


def test_fewer_rows_than_a_batch_are_repeated() -> None:
    batch = Batches(examples(3), batch_size=4, max_length=4, packing=True, seed=0).at(5)
    assert batch.input_ids_BT.tolist() == [[1, 1, 1]] * 4
