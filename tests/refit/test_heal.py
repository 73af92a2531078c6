from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from amoeba_export.ir import SubnetPlan, Supernet
from amoeba_export.load.refit import write_refit
from amoeba_export.materialize import materialize_subnet
from amoeba_export.model.host import Host
from amoeba_export.refit import Draw, HealSettings, RefitRecipe
from amoeba_export.refit.heal import heal
from amoeba_export.refit.stage import Refitted
from amoeba_export.verify import masked_logits
from tests.materialize.subnets import write
from tests.refit.models import IDS, Stopping, cut, fitted, loss_of, opened

SETTINGS = HealSettings(tokens=2560, learning_rate=2e-3)


def healed(
    supernet: Supernet,
    plan: SubnetPlan,
    recipe: RefitRecipe,
    path: Path,
    how: HealSettings = SETTINGS,
    **settings: Any,
) -> tuple[Supernet, SubnetPlan]:
    """The plan with the name of what was trained, and the supernet that has it."""
    specs = materialize_subnet(supernet, plan).specs
    found = []

    def take(made: Refitted) -> None:
        found.append(write_refit(path, made.facts, made.specs, made.weights(), dtype=torch.float32))

    heal(supernet, plan, specs, Draw(recipe=recipe), how, take=take, host=Host(**settings))
    held = dataclasses.replace(supernet, refits={found[0].identity: found[0]})
    return held, dataclasses.replace(plan, refit_id=found[0].identity)


def divergence(supernet: Supernet, plan: SubnetPlan) -> float:
    full = torch.log_softmax(masked_logits(supernet, supernet.full_plan(), IDS), dim=-1)
    found = torch.log_softmax(masked_logits(supernet, plan, IDS), dim=-1)
    return float(torch.nn.functional.kl_div(found, full, reduction="sum", log_target=True))


@pytest.mark.parametrize("shape", ["3x0.6", "2x1"])
def test_it_comes_closer_to_the_full_model_than_its_refit(tmp_path: Path, recipe: RefitRecipe, shape: str) -> None:
    supernet = opened(tmp_path / "model")
    held, (named,) = fitted(supernet, [cut(supernet, shape)], recipe, tmp_path / "refit")
    better, trained = healed(held, named, recipe, tmp_path / "healed.safetensors")
    assert divergence(better, trained) < 0.97 * divergence(held, named)
    dense = AutoModelForCausalLM.from_pretrained(write(materialize_subnet(better, trained), tmp_path / "out"))
    with torch.no_grad():
        torch.testing.assert_close(masked_logits(better, trained, IDS), dense(IDS).logits, rtol=1e-4, atol=1e-4)
    losses = better.refits[trained.refit_id or ""].losses
    assert losses["another"]["refit"] == pytest.approx(loss_of(dense, recipe, supernet.folder, "another"), abs=2e-5)
    assert better.refits[trained.refit_id or ""].kind == "heal"


def test_changes_of_low_rank_are_merged(tmp_path: Path, recipe: RefitRecipe) -> None:
    supernet = opened(tmp_path / "model")
    held, (named,) = fitted(supernet, [cut(supernet)], recipe, tmp_path / "refit")
    how = dataclasses.replace(SETTINGS, rank=4, learning_rate=6e-4)
    better, trained = healed(held, named, recipe, tmp_path / "healed.safetensors", how)
    losses = [file.losses["mix"]["refit"] for file in (better.refits[trained.refit_id or ""], *held.refits.values())]
    assert losses[0] < losses[1]
    before, after = materialize_subnet(held, named), materialize_subnet(better, trained)
    changed = {
        name: after_weight.float() - before_weight.float()
        for (name, before_weight), (_, after_weight) in zip(before.stream(), after.stream(), strict=True)
    }
    assert torch.linalg.matrix_rank(changed["model.layers.0.mlp.gate_proj.weight"], atol=1e-5) == 4
    assert changed["model.norm.weight"].any() and changed["model.layers.0.mlp.down_proj.bias"].any()
    assert not changed["model.embed_tokens.weight"].any()


def test_large_cuts_get_changes_of_low_rank(
    tmp_path: Path, recipe: RefitRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("amoeba_export.refit.heal.FULL_WEIGHTS_BELOW", 1000)
    monkeypatch.setattr("amoeba_export.refit.heal.RANK", 2)
    supernet = opened(tmp_path / "model")
    plan = cut(supernet)
    how = dataclasses.replace(SETTINGS, learning_rate=2e-4)
    better, trained = healed(supernet, plan, recipe, tmp_path / "healed.safetensors", how)
    assert better.refits[trained.refit_id or ""].settings["rank"] == 2


def test_a_layer_without_heads_is_trained_too(tmp_path: Path, recipe: RefitRecipe) -> None:
    supernet = opened(tmp_path / "model", "qwen3")
    plan = cut(supernet, "3x0.6", policy="adaptive")
    layers = (dataclasses.replace(plan.layers[0], query_heads=(), kv_heads=()), *plan.layers[1:])
    plan = dataclasses.replace(plan, layers=layers)
    better, trained = healed(supernet, plan, recipe, tmp_path / "healed.safetensors")
    names = better.refits[trained.refit_id or ""].tensors.names()
    assert "model.layers.0.self_attn.o_proj.bias" in names and "model.layers.0.self_attn.q_proj.weight" not in names
    assert divergence(better, trained) < divergence(supernet, plan)


def test_a_run_that_was_stopped_goes_on_to_the_same_bytes(
    tmp_path: Path, recipe: RefitRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("amoeba_export.refit.distill.SAVE_SECONDS", 0.0)
    supernet = opened(tmp_path / "model")
    plan = cut(supernet)
    _, expected = healed(supernet, plan, recipe, tmp_path / "whole.safetensors")
    with pytest.raises(KeyboardInterrupt):
        healed(supernet, plan, recipe, tmp_path / "not.safetensors", cache_dir=tmp_path / "cache", progress=Stopping(9))
    assert list((tmp_path / "cache").rglob("checkpoint.pt"))
    _, found = healed(supernet, plan, recipe, tmp_path / "stopped.safetensors", cache_dir=tmp_path / "cache")
    assert found.refit_id == expected.refit_id
    assert not list((tmp_path / "cache").rglob("checkpoint.pt"))


def test_the_time_ends_it_and_the_best_weights_are_kept(tmp_path: Path, recipe: RefitRecipe) -> None:
    """A clock that goes on by a second whenever it is asked."""
    seconds = iter(range(10_000))
    supernet = opened(tmp_path / "model")
    plan = cut(supernet)
    found = []
    heal(
        supernet,
        plan,
        materialize_subnet(supernet, plan).specs,
        Draw(recipe=recipe),
        dataclasses.replace(SETTINGS, tokens=10**9, seconds=60.0),
        take=found.append,
        host=Host(),
        clock=lambda: float(next(seconds)),
    )
    trained = found[0].facts["settings"]["trained_tokens"]
    assert 0 < trained <= 60 * SETTINGS.rows * recipe.window
