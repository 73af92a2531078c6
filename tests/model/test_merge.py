from __future__ import annotations

import pytest
import torch

from amoeba_export.ir import AdapterDelta
from amoeba_export.model import merge
from amoeba_export.model.merge import cut_and_merge

ROWS = torch.tensor([0, 2, 5])
COLUMNS = torch.tensor([1, 3, 4, 7])


def _delta(*, dora: bool = False, seed: int = 1) -> AdapterDelta:
    generator = torch.Generator().manual_seed(seed)
    return AdapterDelta(
        a_RI=torch.randn(2, 8, generator=generator),
        b_OR=torch.randn(6, 2, generator=generator),
        scale=0.5,
        magnitude_O=torch.rand(6, generator=generator) + 1 if dora else None,
    )


@pytest.fixture(name="w_OI")
def _weight() -> torch.Tensor:
    return torch.randn(6, 8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("rows", [None, ROWS])
@pytest.mark.parametrize("columns", [None, COLUMNS])
@pytest.mark.parametrize("dora", [False, True])
def test_cut_after_merging_the_whole_weight_gives_the_same(
    w_OI: torch.Tensor, rows: torch.Tensor | None, columns: torch.Tensor | None, dora: bool
) -> None:
    delta, before = _delta(dora=dora), w_OI.clone()
    whole = w_OI + 0.5 * delta.b_OR @ delta.a_RI
    if delta.magnitude_O is not None:
        whole = delta.magnitude_O[:, None] * whole / whole.norm(dim=1, keepdim=True)
    expected = whole[slice(None) if rows is None else rows][:, slice(None) if columns is None else columns]
    torch.testing.assert_close(cut_and_merge(w_OI, rows, columns, [delta], torch.float32), expected)
    assert torch.equal(w_OI, before)


def test_adapters_apply_in_order_each_to_the_result_of_the_last(w_OI: torch.Tensor) -> None:
    """peft merges them so: the second DoRA normalises what the first one made."""
    first, second = _delta(dora=True, seed=1), _delta(dora=True, seed=2)
    once = cut_and_merge(w_OI, None, None, [first], torch.float32)
    expected = cut_and_merge(once, ROWS, COLUMNS, [second], torch.float32)
    torch.testing.assert_close(cut_and_merge(w_OI, ROWS, COLUMNS, [first, second], torch.float32), expected)


def test_half_precision_is_rounded_once() -> None:
    """Two steps of 0.375 ulp: each alone would be rounded away, their sum is not."""
    ulp = 2.0**-7
    w = torch.ones(1, 1, dtype=torch.bfloat16)
    small = AdapterDelta(a_RI=torch.ones(1, 1), b_OR=torch.full((1, 1), 0.375 * ulp), scale=1.0)
    assert cut_and_merge(w, None, None, [small], torch.bfloat16).item() == 1.0
    assert cut_and_merge(w, None, None, [small, small], torch.bfloat16).item() == 1.0 + ulp


def test_blocks_of_rows_do_not_change_the_result(w_OI: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = cut_and_merge(w_OI, ROWS, COLUMNS, [_delta(dora=True)], torch.float32)
    monkeypatch.setattr(merge, "ROWS", 2)
    # Not bit for bit: a BLAS may sum a product of two rows in another order than one of three.
    torch.testing.assert_close(cut_and_merge(w_OI, ROWS, COLUMNS, [_delta(dora=True)], torch.float32), whole)


def test_nothing_to_do_is_no_copy(w_OI: torch.Tensor) -> None:
    assert cut_and_merge(w_OI, None, None, [], torch.float32) is w_OI
