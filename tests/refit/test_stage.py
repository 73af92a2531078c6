from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from amoeba_export.errors import DamagedFile, InputError, NotFound, WrongModel
from amoeba_export.ir import Policy, SubnetPlan
from amoeba_export.load.refit import read_refit
from amoeba_export.materialize import materialize_subnet
from amoeba_export.refit import RefitRecipe, stage
from amoeba_export.verify import masked_logits
from tests.listener import Listener
from tests.materialize.subnets import noise_adapter, write
from tests.refit.models import IDS, Stopping, cut, fitted, loss_of, opened
from tests.tiny import FAMILIES


def test_the_losses_it_reports_are_those_of_the_models(tmp_path: Path, recipe: RefitRecipe) -> None:
    supernet = opened(tmp_path / "model")
    plan = cut(supernet)
    held, (named,) = fitted(supernet, [plan], recipe, tmp_path / "refit")
    losses = held.refits[named.refit_id or ""].losses
    models = {
        "full": AutoModelForCausalLM.from_pretrained(supernet.folder),
        "cut": AutoModelForCausalLM.from_pretrained(write(materialize_subnet(supernet, plan), tmp_path / "cut")),
        "refit": AutoModelForCausalLM.from_pretrained(write(materialize_subnet(held, named), tmp_path / "fitted")),
    }
    for text in ("mix", "another"):
        for name, model in models.items():
            assert losses[text][name] == pytest.approx(loss_of(model, recipe, supernet.folder, text), abs=2e-5)


def test_the_stream_comes_closer_to_the_full_models(tmp_path: Path, recipe: RefitRecipe) -> None:
    """Random weights and text have no loss worth lowering; the last hidden states have a distance."""
    supernet = opened(tmp_path / "model")
    plan = cut(supernet)
    held, (named,) = fitted(supernet, [plan], recipe, tmp_path / "refit")
    full = masked_logits(supernet, supernet.full_plan(), IDS)
    before = (masked_logits(supernet, plan, IDS) - full).norm()
    after = (masked_logits(held, named, IDS) - full).norm()
    assert after < 0.8 * before


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("policy", ["uniform", "adaptive"])
def test_the_masked_supernet_agrees_with_what_is_written(
    tmp_path: Path, recipe: RefitRecipe, family: str, policy: Policy, monkeypatch: pytest.MonkeyPatch
) -> None:
    # transformers would take the tokenizer of the family, whose vocabulary is another one
    monkeypatch.setattr("amoeba_export.refit.data.open_tokenizer", PreTrainedTokenizerFast.from_pretrained)
    supernet = opened(tmp_path / "model", family)
    held, (named,) = fitted(supernet, [cut(supernet, policy=policy)], recipe, tmp_path / "refit")
    subnet = materialize_subnet(held, named)
    weights = dict(subnet.stream())
    assert {name: tuple(weight.shape) for name, weight in weights.items()} == {s.name: s.shape for s in subnet.specs}
    if policy == "uniform":
        dense = AutoModelForCausalLM.from_pretrained(write(subnet, tmp_path / "out"))
        with torch.no_grad():
            expected = dense(IDS).logits
        torch.testing.assert_close(masked_logits(held, named, IDS), expected, rtol=1e-4, atol=1e-4)


def test_adapters_are_in_what_was_fitted_and_not_added_again(tmp_path: Path, recipe: RefitRecipe) -> None:
    supernet = opened(tmp_path / "model")
    adapter = noise_adapter(supernet)
    supernet = dataclasses.replace(supernet, adapters=(adapter,), inputs=(*supernet.inputs, adapter.input))
    held, (named,) = fitted(supernet, [cut(supernet)], recipe, tmp_path / "refit")
    dense = AutoModelForCausalLM.from_pretrained(write(materialize_subnet(held, named), tmp_path / "out"))
    with torch.no_grad():
        torch.testing.assert_close(masked_logits(held, named, IDS), dense(IDS).logits, rtol=1e-4, atol=1e-4)
    without = dataclasses.replace(held, adapters=(), inputs=supernet.inputs[:1])
    with pytest.raises(WrongModel, match="other adapters"):
        materialize_subnet(without, named)


def test_texts_are_read_with_the_tokenizer_that_an_adapter_brings(tmp_path: Path, recipe: RefitRecipe) -> None:
    """The model's own has tokens that a smaller vocabulary lacks."""
    supernet = opened(tmp_path / "model")
    (tmp_path / "adapter").mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (supernet.folder / name).rename(tmp_path / "adapter" / name)
    supernet = dataclasses.replace(supernet, tokenizer_folder=tmp_path / "adapter")
    held, (named,) = fitted(supernet, [cut(supernet)], recipe, tmp_path / "refit")
    assert named.refit_id in held.refits


def test_a_plan_without_biases_gets_none(tmp_path: Path, recipe: RefitRecipe) -> None:
    supernet = opened(tmp_path / "model")
    plan = dataclasses.replace(cut(supernet), compensate=False)
    held, (named,) = fitted(supernet, [plan], recipe, tmp_path / "refit")
    names = held.refits[named.refit_id or ""].tensors.names()
    assert len(names) == 2 * len(plan.layers) and not any(name.endswith("bias") for name in names)


def test_plans_that_are_fitted_together_come_out_as_if_alone(tmp_path: Path, recipe: RefitRecipe) -> None:
    supernet = opened(tmp_path / "model")
    plans = [cut(supernet, "3x0.6"), cut(supernet, "2x1"), cut(supernet, "4x0.5")]
    _, together = fitted(supernet, plans, recipe, tmp_path / "together")
    alone = [fitted(supernet, [plan], recipe, tmp_path / f"alone-{i}")[1][0] for i, plan in enumerate(plans)]
    contents = [read_refit(tmp_path / "together" / f"refit-{i}.safetensors") for i in range(3)]
    for i, (held, named) in enumerate(zip(contents, alone, strict=True)):
        other = read_refit(tmp_path / f"alone-{i}" / "refit-0.safetensors")
        assert held.geometry == other.geometry == named.geometry
        for name in other.tensors.names():
            assert torch.equal(held.tensors.read(name), other.tensors.read(name))
    assert len({plan.refit_id for plan in together}) == 3


@pytest.mark.parametrize("memory_bytes", [0, stage.MEMORY_BYTES])
@pytest.mark.parametrize("after", [1, 2, 3])
def test_a_run_that_was_stopped_goes_on_to_the_same_bytes(
    tmp_path: Path, recipe: RefitRecipe, after: int, memory_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stage, "MEMORY_BYTES", memory_bytes)
    supernet = opened(tmp_path / "model")
    plans = [cut(supernet, "3x0.6"), cut(supernet, "2x0.8")]
    _, expected = fitted(supernet, plans, recipe, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        fitted(supernet, plans, recipe, tmp_path / "stopped", cache_dir=tmp_path / "cache", progress=Stopping(after))
    _, found = fitted(supernet, plans, recipe, tmp_path / "stopped", cache_dir=tmp_path / "cache")
    assert [plan.refit_id for plan in found] == [plan.refit_id for plan in expected]
    assert not list((tmp_path / "cache").rglob("*.f32"))


def test_where_the_streams_lie_does_not_change_a_bit(
    tmp_path: Path, recipe: RefitRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    supernet = opened(tmp_path / "model")
    plans = [cut(supernet, "3x0.6"), cut(supernet, "2x0.8")]
    _, in_memory = fitted(supernet, plans, recipe, tmp_path / "memory")
    one_stream = 4 * supernet.architecture.hidden_size * (4096 + 512 + 512)
    for memory_bytes in (0, 3 * one_stream):
        monkeypatch.setattr(stage, "MEMORY_BYTES", memory_bytes + stage._solve_bytes_of(supernet.architecture))
        _, elsewhere = fitted(supernet, plans, recipe, tmp_path / f"disk-{memory_bytes}")
        assert [plan.refit_id for plan in elsewhere] == [plan.refit_id for plan in in_memory]


@pytest.mark.parametrize("pattern", ["solved-0-*", "*.f32"])
def test_a_file_of_a_stopped_run_that_is_damaged_is_made_again(
    tmp_path: Path, recipe: RefitRecipe, pattern: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stage, "MEMORY_BYTES", 0)
    supernet = opened(tmp_path / "model")
    plans = [cut(supernet, "4x0.6")]
    _, expected = fitted(supernet, plans, recipe, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        fitted(supernet, plans, recipe, tmp_path / "stopped", cache_dir=tmp_path / "cache", progress=Stopping(2))
    damaged = list((tmp_path / "cache").rglob(pattern))
    assert damaged
    for path in damaged:
        content = bytearray(path.read_bytes())
        content[-3] ^= 0x40
        path.write_bytes(content)
    listener = Listener()
    _, found = fitted(supernet, plans, recipe, tmp_path / "stopped", cache_dir=tmp_path / "cache", progress=listener)
    assert any("is damaged" in note for note in listener.notes)
    assert [plan.refit_id for plan in found] == [plan.refit_id for plan in expected]


def test_a_refit_of_another_cut_is_refused(tmp_path: Path, recipe: RefitRecipe) -> None:
    supernet = opened(tmp_path / "model")
    held, (named,) = fitted(supernet, [cut(supernet)], recipe, tmp_path / "refit")
    other = dataclasses.replace(cut(supernet, "3x0.8"), refit_id=named.refit_id)
    with pytest.raises(WrongModel, match="keeps other layers, heads or neurons"):
        materialize_subnet(held, other)
    with pytest.raises(InputError, match="is not at hand"):
        materialize_subnet(supernet, named)
    again = SubnetPlan.from_json(named.to_json())
    assert again == named and named.to_json()["schema_version"] == 2
    assert "refit_id" not in cut(supernet).to_json() and cut(supernet).to_json()["schema_version"] == 1


def test_a_damaged_refit_is_named(tmp_path: Path, recipe: RefitRecipe) -> None:
    path = tmp_path / "refit.safetensors"
    with pytest.raises(NotFound):
        read_refit(path)
    path.write_text("nothing of the kind", encoding="utf-8")
    with pytest.raises(DamagedFile):
        read_refit(path)
    supernet = opened(tmp_path / "model")
    fitted(supernet, [cut(supernet)], recipe, tmp_path / "refit")
    content = (tmp_path / "refit" / "refit-0.safetensors").read_bytes()
    path.write_bytes(content.replace(b"geometry", b"geometrx"))
    with pytest.raises(DamagedFile, match="geometry"):
        read_refit(path)
    path.write_bytes(content[:-4])
    with pytest.raises(DamagedFile):
        read_refit(path)
