"""Weights that are not as they must be, by value: the limits of each kind of storage."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from amoeba_export.errors import WeightsMismatch
from amoeba_export.materialize import materialize_subnet
from amoeba_export.verify import weights
from amoeba_export.verify.expected import Expected, ExpectedWeights
from amoeba_export.verify.stored import STORED, Stored
from amoeba_export.verify.weights import check_weights, deviation, displacement
from tests.materialize.subnets import open_supernet, plan_for, write

BLOCK = torch.tensor([[-8.0, 7.4, 3.0, 0.0], [1.0, -2.0, 0.4, 4.0]])


def rounded(values: torch.Tensor, steps: torch.Tensor) -> Stored:
    """Four-bit integers, one block a row."""
    integers = (values / steps).round().clamp(-8, 7)
    return Stored(values=integers * steps, dtype="int4", steps=steps, block=4)


def found(stored: Stored, values: torch.Tensor = BLOCK) -> str | None:
    return deviation(stored, Expected(values, 0.0))


def test_integers_are_the_nearest_on_steps_that_the_block_needs() -> None:
    steps = torch.tensor([[1.0], [0.5]])
    assert found(rounded(BLOCK, steps)) is None
    other = rounded(BLOCK, steps)
    other.values[1, 2] += 0.5
    assert found(other) == "differs in 1 of 2 rows, by up to 0.6"


def test_a_file_does_not_choose_steps_that_hide_what_they_lose() -> None:
    assert found(rounded(BLOCK, torch.tensor([[1.0], [3.0]]))) == "has steps of up to 5.15 times what its values need"


def test_values_on_a_grid_of_few_levels_may_have_its_steps() -> None:
    """A source that was rounded before, whose block uses few of the integers."""
    values = torch.tensor([[-2.0, 3.0, 1.0, 0.0]])
    stored = Stored(values=values.clone(), dtype="int4", steps=torch.ones(1, 1), block=4)
    assert found(stored, values) is None
    near = torch.tensor([[-2.0, 3.0, 1.3, 0.0]])
    assert found(stored, near) == "has steps of up to 2.29 times what its values need"


def test_the_largest_positive_value_may_lack_a_step() -> None:
    values = torch.tensor([[-8.0, 8.0, 1.0, 0.0]])
    stored = rounded(values, torch.ones(1, 1))
    assert stored.values.tolist() == [[-8, 7, 1, 0]]
    assert found(stored, values) is None
    inward = Stored(values=torch.tensor([[-7.0, 7.0, 1.0, 0.0]]), dtype="int4", steps=torch.ones(1, 1), block=4)
    assert found(inward, torch.tensor([[-6.0, 7.0, 1.0, 0.0]])) is not None


def test_integers_that_were_chosen_with_data_stand_for_the_model() -> None:
    wanted = torch.randn(8, 64, generator=torch.Generator().manual_seed(0))
    noise = torch.randn(8, 64, generator=torch.Generator().manual_seed(1))
    assert displacement(wanted + 0.5 * noise, wanted) is None
    assert displacement(-wanted, wanted) == (
        "has integers that do not stand for the model's: it is off by 2 of its size"
    )
    for other in (wanted * 0, wanted.roll(1, 0), wanted * torch.nan):
        assert displacement(other, wanted) is not None


@pytest.mark.parametrize(("dtype", "share"), [("fp32", 1e-7), ("fp16", 6e-4), ("bf16", 5e-3)])
def test_half_a_unit_in_the_last_place(dtype: str, share: float) -> None:
    kinds = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
    assert found(Stored(values=BLOCK.to(kinds[dtype]).float(), dtype=dtype)) is None
    assert found(Stored(values=BLOCK * (1 + share), dtype=dtype)) is not None


def test_what_is_missing_or_left_over_is_named(tiny_dirs: dict[str, Path], tmp_path: Path) -> None:
    """Zeros that a stock type wants (k_proj.bias beside o_proj.bias) are neither."""
    supernet = open_supernet(tiny_dirs["llama"])
    plan = plan_for(supernet, "3x0.75")
    folder = write(materialize_subnet(supernet, plan), tmp_path / "safetensors")
    expected = ExpectedWeights(supernet, plan)
    check_weights(folder, STORED["safetensors"](folder, expected.wanted), expected)
    weights = load_file(folder / "model.safetensors")
    del weights["model.norm.weight"]
    weights["model.layers.0.self_attn.k_proj.bias"] += 1
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(WeightsMismatch) as caught:
        check_weights(folder, STORED["safetensors"](folder, expected.wanted), expected)
    assert caught.value.problems == (
        "model.norm.weight is missing",
        "model.layers.0.self_attn.k_proj.bias is not part of this plan",
    )


def test_large_weights_are_compared_in_pieces_and_told_as_a_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """Floats and integers: the same words, whether a wrong row is in the first piece, the last, or alone."""
    values = torch.randn(7, 12, generator=torch.Generator().manual_seed(0))
    floats = Stored(values=values.clone(), dtype="fp16")
    steps = values.view(7, 3, 4).abs().amax(-1) / 7
    integers = Stored(
        values=(values / steps.repeat_interleave(4, 1)).round() * steps.repeat_interleave(4, 1),
        dtype="int4",
        steps=steps,
        block=4,
    )
    for stored in (floats, integers):
        assert found(stored, values) is None
        for wrong in ((0,), (6,), (1, 5)):
            other = dataclasses.replace(stored, values=stored.values.clone())
            other.values[list(wrong), 3] += 9.0
            whole = found(other, values)
            assert whole is not None
            assert whole.startswith(f"differs in {len(wrong)} of 7 rows, by up to ")
            with monkeypatch.context() as patch:
                patch.setattr(weights, "_PIECE_VALUES", 24)
                assert found(other, values) == whole
                assert found(stored, values) is None


def test_infinity_is_never_what_was_wanted() -> None:
    values = torch.tensor([[1.0, math.inf]])
    assert found(Stored(values=values, dtype="fp32"), values) is not None
