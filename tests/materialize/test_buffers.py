from __future__ import annotations

import gc

import torch

from amoeba_export.materialize.buffers import SMALL_BYTES, Buffers


def test_memory_of_a_tensor_that_is_gone_is_used_again() -> None:
    buffers = Buffers()
    first = buffers.empty((SMALL_BYTES,), torch.float32)
    place = first.data_ptr()
    del first
    gc.collect()
    second = buffers.empty((3, SMALL_BYTES // 4), torch.bfloat16)  # smaller, of another dtype
    assert second.data_ptr() == place
    assert second.shape == (3, SMALL_BYTES // 4)
    assert second.dtype is torch.bfloat16


def test_memory_is_kept_as_long_as_any_view_of_it() -> None:
    buffers = Buffers()
    row = buffers.empty((2, SMALL_BYTES), torch.uint8).fill_(7)[1]  # the whole is gone, a view is held
    gc.collect()
    buffers.empty((2, SMALL_BYTES), torch.uint8).fill_(9)
    assert row.unique().tolist() == [7]


def test_small_tensors_and_spare_blocks_are_bounded() -> None:
    buffers = Buffers(spare=1)
    held = [buffers.empty((SMALL_BYTES * n,), torch.uint8) for n in (1, 3, 2)]
    largest = held[1].data_ptr()
    del held
    gc.collect()
    small = buffers.empty((8,), torch.uint8)
    kept = buffers.empty((SMALL_BYTES,), torch.uint8)
    assert small.data_ptr() != largest
    assert kept.data_ptr() == largest
    fresh = buffers.empty((SMALL_BYTES,), torch.uint8)
    assert fresh.data_ptr() != largest
