from __future__ import annotations

import torch

from amoeba_export.ir import Architecture, LayerPlan
from amoeba_export.model.slice import kept_positions, take, take_into

ARCHITECTURE = Architecture(
    family="llama",
    num_layers=1,
    hidden_size=8,
    num_heads=4,
    num_kv_heads=2,
    head_dim=2,
    ffn_size=5,
    vocab_size=10,
    max_positions=16,
    norm_eps=1e-5,
    rope_theta=1e4,
)
LAYER = LayerPlan(source_layer=0, query_heads=(1, 3), kv_heads=(0, 1), ffn=(0, 4))


def test_a_head_is_head_dim_neighbouring_positions() -> None:
    assert kept_positions("query", LAYER, ARCHITECTURE).tolist() == [2, 3, 6, 7]  # type: ignore[union-attr]


def test_neurons_are_single_positions() -> None:
    assert kept_positions("ffn", LAYER, ARCHITECTURE).tolist() == [0, 4]  # type: ignore[union-attr]


def test_an_axis_that_keeps_everything_has_no_positions() -> None:
    for axis in ("kv", "hidden", "vocab", "head_dim"):
        assert kept_positions(axis, LAYER, ARCHITECTURE) is None
    assert kept_positions("query", None, ARCHITECTURE) is None


def test_no_heads_is_an_empty_selection_not_a_full_one() -> None:
    empty = LayerPlan(source_layer=0, query_heads=(), kv_heads=(), ffn=())
    assert kept_positions("query", empty, ARCHITECTURE).tolist() == []  # type: ignore[union-attr]


def test_take_copies_what_it_cuts_and_passes_on_what_it_does_not() -> None:
    w = torch.arange(12.0).view(3, 4)
    assert take(w, 1, None) is w
    cut = take(w, 1, torch.tensor([0, 3]))
    assert cut.tolist() == [[0, 3], [4, 7], [8, 11]]
    cut.zero_()
    assert w[0].tolist() == [0, 1, 2, 3]


def test_rows_and_columns_are_gathered_as_indexing_would() -> None:
    rows, columns = torch.tensor([0, 2]), torch.tensor([1, 3, 4])
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        w = torch.randn(3, 5, generator=torch.Generator().manual_seed(0)).to(dtype)
        for kept_rows, kept_columns in ((rows, columns), (rows, None), (None, columns), (None, None)):
            expected = w[slice(None) if kept_rows is None else kept_rows]
            expected = expected[:, slice(None) if kept_columns is None else kept_columns]
            out = torch.empty(expected.shape, dtype=dtype)
            take_into(out, w, kept_rows, kept_columns)
            assert torch.equal(out, expected)
