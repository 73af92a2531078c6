"""Equalized weights compute what the given ones do, and lose less to integers where channels differ."""

from __future__ import annotations

import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from amoeba_export.formats.equalize import Equalizer
from amoeba_export.formats.onnx import writer
from amoeba_export.ir import DenseArchitecture
from amoeba_export.load.family_file import read_family
from tests.formats.onnx_model import OnnxDecoder, random_weights, subnet_of, torch_logits, write_onnx
from tests.formats.test_onnx_values import adaptive, tokens

LAYER = "model.layers.1"


FAMILY = read_family("qwen3").family
"""Has every role that the models here have."""


def equalized(weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    equalizer = Equalizer(weights, FAMILY)
    return dict(ready for name, weight in weights.items() for ready in equalizer.take(name, weight))


def uneven(dense: DenseArchitecture) -> dict[str, torch.Tensor]:
    """A model with channels and neurons of very different size, some with small weights behind large values."""
    weights = random_weights(dense)
    generator = torch.Generator().manual_seed(1)
    for name, weight in weights.items():
        if weight.dim() == 2 and "layers" in name:
            weight *= torch.empty(weight.shape[1]).log_normal_(0, 1, generator=generator)
    return weights


@pytest.mark.parametrize("changes", [{}, {"qkv_bias": True}, {"qk_norm": True}], ids=str)
def test_the_function_is_the_same(changes: Mapping[str, Any]) -> None:
    dense = adaptive(**changes)
    weights = uneven(dense)
    before = {name: weight.clone() for name, weight in weights.items()}
    result = equalized(weights)
    assert result.keys() == weights.keys()
    for name, weight in weights.items():
        torch.testing.assert_close(weight, before[name], rtol=0, atol=0)  # what is given is not written into
    ids = tokens(2, 9)
    torch.testing.assert_close(
        torch_logits(dense, result, ids), torch_logits(dense, weights, ids), rtol=1e-4, atol=1e-4
    )


def test_any_order_gives_the_same_and_a_group_comes_when_it_is_complete() -> None:
    weights = uneven(adaptive())
    expected = equalized(weights)
    shuffled = list(weights)
    random.Random(0).shuffle(shuffled)
    for name, weight in equalized({name: weights[name] for name in shuffled}).items():
        torch.testing.assert_close(weight, expected[name], rtol=0, atol=0)
    equalizer = Equalizer(weights, FAMILY)
    attention = [f"{LAYER}.self_attn.{part}_proj.weight" for part in "qkv"]
    for name in attention:
        assert not list(equalizer.take(name, weights[name]))
    norm = f"{LAYER}.input_layernorm.weight"
    assert [name for name, _ in equalizer.take(norm, weights[norm])] == [norm, *attention]


def test_the_number_of_threads_makes_no_difference() -> None:
    """Sums of many numbers, in another order."""
    generator = torch.Generator().manual_seed(2)
    weights = {f"{LAYER}.input_layernorm.weight": torch.ones(512)}
    for part in "qkv":
        weights[f"{LAYER}.self_attn.{part}_proj.weight"] = torch.randn(512, 512, generator=generator)
    before = torch.get_num_threads()
    found = []
    try:
        for num_threads in (1, 2, 3):
            torch.set_num_threads(num_threads)
            found.append(equalized(weights))
    finally:
        torch.set_num_threads(before)
    for name, weight in found[0].items():
        for other in found[1:]:
            torch.testing.assert_close(other[name], weight, rtol=0, atol=0)


def test_columns_become_alike_and_zeros_stay_zeros() -> None:
    weights = {f"{LAYER}.input_layernorm.weight": torch.ones(64)}
    sizes = torch.logspace(-1, 1, 64)
    sizes[5] = 0
    for part in "qkv":
        weights[f"{LAYER}.self_attn.{part}_proj.weight"] = torch.ones(32, 64) * sizes
    result = equalized(weights)
    for name, weight in result.items():
        assert weight.isfinite().all(), name
    value = result[f"{LAYER}.self_attn.v_proj.weight"]
    assert not value[:, 5].any()
    others = value[0, value[0] > 0]
    assert others.max() / others.min() <= 2 ** (1 / 4) * 1.001  # factors are powers of the fourth root of two


def test_no_factor_is_extreme() -> None:
    weights = {f"{LAYER}.input_layernorm.weight": torch.ones(64)}
    for part in "qkv":
        weights[f"{LAYER}.self_attn.{part}_proj.weight"] = torch.ones(32, 64)
        weights[f"{LAYER}.self_attn.{part}_proj.weight"][:, 0] = 1e-12
    gain = equalized(weights)[f"{LAYER}.input_layernorm.weight"]
    assert gain[0] == 2**-8
    assert gain.max() <= 4


@pytest.mark.parametrize("dtype", ["int8", "int4"])
def test_integers_lose_less(dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dense = adaptive()
    weights = uneven(dense)
    # Large channels have small weights behind them, as in models that were trained.
    for name in [name for name in weights if name.endswith("v_proj.weight")]:
        norm = name.replace("self_attn.v_proj", "input_layernorm")
        weights[norm] = weights[norm] / weights[name].square().mean(0).sqrt()
    ids = tokens(2, 9)
    exact = torch_logits(dense, weights, ids)
    errors = []
    for folder in ("with", "without"):
        if folder == "without":
            monkeypatch.setattr(writer, "Equalizer", lambda names, family, **_: Equalizer((), family))
        written = write_onnx(subnet_of(dense, weights, tmp_path), tmp_path / folder, dtype=dtype)
        errors.append(float((OnnxDecoder(written)(ids) - exact).norm()))
    assert errors[0] < 0.8 * errors[1]
