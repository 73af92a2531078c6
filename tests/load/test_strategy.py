from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from amoeba_export.ir import FixedWidth, Importance, Shape, Strategy
from amoeba_export.load import read_strategy, write_strategy

LAYERS, HEADS, HEAD_DIM, FFN, HIDDEN = 4, 6, 32, 96, 96


def own_strategy(**overrides: object) -> Strategy:
    """A strategy with importances, of the dims of the tiny `llama`."""
    rng = np.random.default_rng(0)
    fields: dict[str, object] = {
        "model_id": None,
        "num_layers": LAYERS,
        "num_heads": HEADS,
        "num_kv_heads": 3,
        "head_dim": HEAD_DIM,
        "ffn_size": FFN,
        "depth": {0: (1, 1, 1, 1), 1: (1, 0, 1, 1), 2: (1, 0, 0, 1)},
        "depth_metric": {0: 1.5, 1: 1.75, 2: 2.125},
        "importance": Importance(
            heads_LN=rng.normal(size=(LAYERS, HEADS)),
            ffn_LF=rng.normal(size=(LAYERS, FFN)),
            o_mean_LQ=rng.normal(size=(LAYERS, HEADS * HEAD_DIM)).astype(np.float32),
            down_mean_LF=rng.normal(size=(LAYERS, FFN)).astype(np.float32),
            metric="WIFV",
        ),
        "quality": {Shape(4, 1.0): 1.5, Shape(2, 0.75): 2.5},
        "provenance": {"recipe": "quick", "seed": "0"},
    }
    return Strategy(**(fields | overrides))  # type: ignore[arg-type]


def imported_strategy() -> Strategy:
    """A strategy with masks and no importances."""
    masks = FixedWidth(
        heads_LN=np.ones((LAYERS, HEADS), dtype=bool),
        ffn_LF=np.arange(LAYERS * FFN).reshape(LAYERS, FFN) % 3 > 0,
        o_bias_LD=np.zeros((LAYERS, HIDDEN), dtype=np.float32),
        down_bias_LD=np.full((LAYERS, HIDDEN), 0.25, dtype=np.float32),
    )
    return own_strategy(importance=None, widths={0.65: masks, 1.0: dataclasses.replace(masks)})


def assert_same(a: Strategy, b: Strategy) -> None:
    for field in dataclasses.fields(Strategy):
        if field.name not in ("importance", "widths"):
            assert getattr(a, field.name) == getattr(b, field.name), field.name
    assert (a.importance is None) == (b.importance is None)
    assert list(a.widths) == sorted(b.widths, reverse=True)
    pairs = [(a.widths[key], b.widths[key]) for key in a.widths]
    for left, right in [*pairs, *([(a.importance, b.importance)] if a.importance else [])]:
        for field in dataclasses.fields(left):  # type: ignore[arg-type]
            x, y = getattr(left, field.name), getattr(right, field.name)
            assert np.array_equal(x, y) and getattr(x, "dtype", None) == getattr(y, "dtype", None), field.name


@pytest.mark.parametrize("make", [own_strategy, imported_strategy])
def test_a_strategy_survives_its_file(tmp_path: Path, make):  # type: ignore[no-untyped-def]
    written = write_strategy(make(), tmp_path / "s.safetensors")
    assert_same(read_strategy(tmp_path / "s.safetensors"), written)
    assert [path.name for path in tmp_path.iterdir()] == ["s.safetensors"]


def test_the_same_strategy_gives_the_same_bytes(tmp_path: Path):
    first = write_strategy(own_strategy(), tmp_path / "a.safetensors")
    second = write_strategy(read_strategy(tmp_path / "a.safetensors"), tmp_path / "b.safetensors")
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    assert first.identity == second.identity
