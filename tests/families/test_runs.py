"""One line per family: it is calibrated, fine-tuned, refitted and healed, and what comes out has the right values."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from amoeba_export.calibrate import Recipe, calibrate
from amoeba_export.finetune import LowRankSettings, Settings, finetune_adapter
from amoeba_export.ir import Shape, SubnetPlan, Supernet
from amoeba_export.ir.derive import derive_plan
from amoeba_export.load import load_supernet
from amoeba_export.load.refit import write_refit
from amoeba_export.materialize import materialize_subnet
from amoeba_export.model.host import Host
from amoeba_export.model.samples import read_samples
from amoeba_export.refit import Draw, HealSettings, RefitRecipe
from amoeba_export.refit.heal import heal
from amoeba_export.refit.recipe import Share
from amoeba_export.refit.stage import Refitted
from amoeba_export.verify import masked_logits
from tests.families.configs import FAMILIES, save_families
from tests.families.test_matrix import IDS, assert_same, stock
from tests.materialize.subnets import noise_strategy, write
from tests.model.models import plain_loss, random_text, save_tokenizer, whole_model
from tests.refit.models import cut, fitted
from tests.tiny import VOCAB

TOKENS = torch.randint(0, VOCAB, (8, 32), generator=torch.Generator().manual_seed(4))
ROOMS = ("model.samples", "finetune.loop", "refit.data")
"""Who opens the tokenizer."""


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return save_families(tmp_path_factory.mktemp("families"), FAMILIES, save_tokenizer)


@pytest.fixture(autouse=True)
def _words(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokenizers are read as they are: `AutoTokenizer` would take the class of a family."""
    for room in ROOMS:
        monkeypatch.setattr(f"amoeba_export.{room}.open_tokenizer", PreTrainedTokenizerFast.from_pretrained)


@pytest.fixture(params=FAMILIES)
def supernet(request: pytest.FixtureRequest, folders: dict[str, Path]) -> Supernet:
    found = load_supernet(str(folders[request.param]))
    return dataclasses.replace(found, strategy=noise_strategy(found.architecture))


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(random_text(4000), encoding="utf-8")
    return path


def test_calibration_measures_the_model_of_transformers(supernet: Supernet, text: Path) -> None:
    data = {"file": str(text), "window": 16, "samples": 4, "heldout": 4, "batch": 4}
    recipe = Recipe.model_validate(
        {"name": "tiny", "data": data, "depth": {"max_removed": 1}, "quality": {"widths": [1.0, 0.5]}}
    )
    strategy = calibrate(supernet, recipe)
    search, heldout = read_samples(recipe.data, supernet.folder, seed=0)
    model = whole_model(supernet)
    assert strategy.depth_metric[0] == pytest.approx(plain_loss(model, [True] * 4, search), rel=1e-5)
    assert strategy.quality[Shape(4, 1.0)] == pytest.approx(plain_loss(model, [True] * 4, heldout), rel=1e-5)
    calibrated = dataclasses.replace(supernet, strategy=strategy)
    plan = derive_plan(strategy, supernet.architecture, Shape(3, 0.5))
    losses = []
    for batch in heldout.batches:
        logits_BTV = masked_logits(calibrated, plan, batch.tokens_BT)[batch.rows_S, batch.positions_S]
        losses.append(torch.nn.functional.cross_entropy(logits_BTV, batch.targets_S, reduction="none"))
    assert strategy.quality[Shape(3, 0.5)] == pytest.approx(float(torch.cat(losses).mean()), rel=1e-5)


@pytest.mark.parametrize("mode", ["smol", "lora"])
def test_an_adapter_is_trained_and_merged(supernet: Supernet, mode: Any, text: Path, tmp_path: Path) -> None:
    settings = Settings(
        low_rank=LowRankSettings(mode=mode, rank=4, alpha=8.0, experts=3, top_k=2),
        widths=(1.0, 0.5),
        depths=(3,),
        subnets=2,
        max_steps=2,
        batch_size=1,
        max_length=32,
        learning_rate=1e-2,
    )
    done = finetune_adapter(supernet, data=text, out=tmp_path / "adapter", settings=settings)
    assert all(0 < loss < 100 for loss in done.losses.values())
    again = load_supernet(str(supernet.folder), adapters=[tmp_path / "adapter"])
    again = dataclasses.replace(again, strategy=supernet.strategy)
    plan = cut(again, "3x0.5")
    plan = dataclasses.replace(plan, gate_width=0.5 if mode == "smol" else None)
    unmerged = masked_logits(again, plan, IDS)
    assert float((unmerged - masked_logits(supernet, plan, IDS)).abs().max()) > 1e-3
    assert_same(stock(write(materialize_subnet(again, plan), tmp_path / "out")), unmerged)


@pytest.mark.parametrize("supernet", [name for name in FAMILIES if "moe" not in name], indirect=True)
def test_a_cut_is_refitted_and_healed(supernet: Supernet, text: Path, tmp_path: Path) -> None:
    recipe = RefitRecipe(
        name="tiny",
        tokens=2048,
        judge_tokens=256,
        other_tokens=256,
        window=32,
        mix=(Share(file=str(text)),),
        other=(Share(file=str(text)),),
    )
    plan = cut(supernet, "3x0.6")
    held, (named,) = fitted(supernet, [plan], recipe, tmp_path / "refit")
    refit = distance(held, named)
    assert refit < distance(supernet, plan)
    assert_same(stock(write(materialize_subnet(held, named), tmp_path / "fitted")), masked_logits(held, named, IDS))
    found = []

    def take(one: Refitted) -> None:
        path = tmp_path / "healed.safetensors"
        found.append(write_refit(path, one.facts, one.specs, one.weights(), dtype=torch.float32))

    how, specs = HealSettings(tokens=1024, learning_rate=2e-3), materialize_subnet(held, named).specs
    heal(held, named, specs, Draw(recipe=recipe), how, take=take, host=Host())
    healed = dataclasses.replace(held, refits={found[0].identity: found[0]})
    trained = dataclasses.replace(named, refit_id=found[0].identity)
    assert distance(healed, trained) < refit
    assert_same(
        stock(write(materialize_subnet(healed, trained), tmp_path / "healed")), masked_logits(healed, trained, IDS)
    )


def distance(supernet: Supernet, plan: SubnetPlan) -> float:
    """Kullback-Leibler divergence from the whole model. Random weights and text have no loss worth lowering."""
    whole = torch.log_softmax(masked_logits(supernet, supernet.full_plan(), TOKENS), dim=-1)
    found = torch.log_softmax(masked_logits(supernet, plan, TOKENS), dim=-1)
    divergence = float(torch.nn.functional.kl_div(found, whole, reduction="sum", log_target=True)) / TOKENS.numel()
    assert 0 < divergence < 100
    return divergence
