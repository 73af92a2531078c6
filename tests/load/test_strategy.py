from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file

from amoeba_export.errors import DamagedFile, InputError, NotFound, WrongModel
from amoeba_export.ir import FixedWidth, Importance, Shape, Strategy
from amoeba_export.load import check_strategy, load_supernet, read_strategy, write_strategy

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


# --- files that are not strategies ------------------------------------------------------------------------------------


def test_a_missing_strategy_says_how_to_make_one(tmp_path: Path):
    with pytest.raises(NotFound) as caught:
        read_strategy(tmp_path / "s.safetensors")
    assert str(caught.value) == (
        f"The strategy was not found: {tmp_path / 's.safetensors'}\n"
        "  next:  Make one with 'amoeba calibrate --out strategy.safetensors'."
    )


def test_an_upstream_file_is_sent_to_import(goldens: Path):
    path = goldens / "C" / "dp_selection_strategy.npy"
    with pytest.raises(InputError) as caught:
        read_strategy(path)
    assert str(caught.value) == (
        "This is a strategy of the published AmoebaLLM code.\n"
        f"  where: {path}\n"
        "  next:  Convert it once: 'amoeba import FILE MODEL --out strategy.safetensors'."
    )


@pytest.mark.parametrize("keep", [0, 7, 100, -1])
def test_a_truncated_strategy(tmp_path: Path, keep: int):
    path = tmp_path / "s.safetensors"
    write_strategy(own_strategy(), path)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(DamagedFile) as caught:
        read_strategy(path)
    assert caught.value.where == str(path)
    assert caught.value.next_step == "Make it again with 'amoeba calibrate' or 'amoeba import'."


def rewrite(path: Path, change: Callable[[dict[str, Any], dict[str, Any]], None]) -> Path:
    """A strategy file whose JSON and arrays `change` has changed."""
    write_strategy(own_strategy(), path)
    with safe_open(path, "np") as file:
        data, arrays = json.loads(file.metadata()["amoeba_strategy"]), {n: file.get_tensor(n) for n in file.keys()}  # noqa: SIM118
    change(data, arrays)
    save_file(arrays, path, metadata={"amoeba_strategy": json.dumps(data)})
    return path


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda data, arrays: data.pop("depth"), "it has no key 'depth'"),
        (lambda data, arrays: arrays.pop("importance.ffn_LF"), "it has no array 'importance.ffn_LF'"),
        (lambda data, arrays: data.update(num_layers="many"), "num_layers is 'many', not a whole number"),
        (lambda data, arrays: data["depth"].update({"1": [1, 1, 1, 1]}), "the layers kept without 1 are not 3 of 4"),
        (lambda data, arrays: data["depth"].update({"1": [1, 2, 0, 0]}), "the layers kept without 1 are not 3 of 4"),
        (lambda data, arrays: data["depth"].pop("0"), "the full depth is missing"),
        (lambda data, arrays: data.update(num_heads=5), "heads_LN has shape [4, 6]; o_mean_LQ has shape [4, 192]"),
        (
            lambda data, arrays: arrays.update({"importance.ffn_LF": np.zeros((4, 96), dtype=np.int32)}),
            "ffn_LF is int32 [4, 96]",
        ),
        (
            lambda data, arrays: arrays["importance.down_mean_LF"].__setitem__((0, 0), np.nan),
            "down_mean_LF is not finite",
        ),
    ],
)
def test_parts_that_do_not_fit_together(tmp_path: Path, change: Any, reason: str):
    with pytest.raises(DamagedFile) as caught:
        read_strategy(rewrite(tmp_path / "s.safetensors", change))
    assert reason in caught.value.what


def test_another_version(tmp_path: Path):
    with pytest.raises(InputError) as caught:
        read_strategy(rewrite(tmp_path / "s.safetensors", lambda data, arrays: data.update(schema_version=9)))
    assert caught.value.what == "This strategy has schema version 9; this amoeba reads 1."


def test_weights_are_not_a_strategy(tiny_dirs: dict[str, Path]):
    with pytest.raises(DamagedFile, match="a safetensors file without a strategy in it"):
        read_strategy(tiny_dirs["llama"] / "model.safetensors")


def test_a_failed_write_leaves_nothing(tmp_path: Path):
    (tmp_path / "s.safetensors").mkdir()
    with pytest.raises(OSError):  # noqa: PT011 which one depends on the system
        write_strategy(own_strategy(), tmp_path / "s.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["s.safetensors"]


# --- strategies of another model --------------------------------------------------------------------------------------


def test_a_strategy_that_fits_is_attached(tiny_dirs: dict[str, Path], tmp_path: Path):
    identity = load_supernet(str(tiny_dirs["llama"])).identity
    written = write_strategy(own_strategy(model_id=identity), tmp_path / "s.safetensors")
    supernet = load_supernet(str(tiny_dirs["llama"]), strategy=tmp_path / "s.safetensors")
    assert supernet.strategy is not None and supernet.strategy.identity == written.identity
    entry = supernet.inputs[1]
    assert (entry.role, entry.id, entry.sha256) == ("strategy", "s.safetensors", written.identity)


def test_all_differing_dims_are_named(tiny_dirs: dict[str, Path], tmp_path: Path):
    write_strategy(own_strategy(), tmp_path / "s.safetensors")
    with pytest.raises(WrongModel) as caught:
        load_supernet(str(tiny_dirs["qwen3"]), strategy=tmp_path / "s.safetensors")
    assert str(caught.value) == (
        "The strategy was made for another model: num_heads is 6 there and 4 here; "
        "num_kv_heads is 3 there and 2 here.\n"
        f"  where: {tmp_path / 's.safetensors'}\n"
        "  next:  Use the strategy that belongs to this model, or make a new one."
    )


def test_the_same_dims_are_not_the_same_model(tiny_dirs: dict[str, Path]):
    supernet = load_supernet(str(tiny_dirs["llama"]))
    with pytest.raises(WrongModel) as caught:
        check_strategy(own_strategy(model_id="0123456789abcdef"), supernet)
    assert caught.value.what == (
        f"The strategy was made for another model: its model is 0123456789ab, this one is {supernet.identity[:12]}."
    )


def test_biases_tell_another_hidden_size(tiny_dirs: dict[str, Path]):
    strategy = imported_strategy()
    widths = {
        width: dataclasses.replace(fixed, o_bias_LD=np.zeros((LAYERS, 64), dtype=np.float32))
        for width, fixed in strategy.widths.items()
    }
    with pytest.raises(WrongModel, match="hidden_size is 64 there and 96 here"):
        check_strategy(dataclasses.replace(strategy, widths=widths), load_supernet(str(tiny_dirs["llama"])))
