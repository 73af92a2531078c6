"""LoRA on modules that hold several matrices: what peft makes of the model of transformers, in the parts."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from amoeba_export.errors import DamagedFile, WrongModel
from amoeba_export.ir import SubnetPlan
from amoeba_export.load import load_supernet
from amoeba_export.materialize import materialize_subnet
from amoeba_export.verify import masked_logits
from tests.families.configs import save_family
from tests.families.test_matrix import IDS, assert_same, cuts, stock
from tests.load.adapters import train_at_random
from tests.materialize.subnets import noise_strategy, write

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
FUSED = ["qkv_proj", "gate_up_proj"]


@pytest.fixture(scope="module")
def phi(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_family(tmp_path_factory.mktemp("phi") / "model", "phi3")


def trained(phi: Path, folder: Path, **options: Any) -> torch.Tensor:
    """Save a random adapter of the model, and give the logits of the model with peft's own merge."""
    settings: dict[str, Any] = {"r": 4, "lora_alpha": 6, "target_modules": [*FUSED, "o_proj", "down_proj"], **options}
    plain = AutoModelForCausalLM.from_pretrained(phi, dtype=torch.float32)
    model = peft.get_peft_model(plain, peft.LoraConfig(task_type="CAUSAL_LM", **settings))
    train_at_random(model)
    with torch.no_grad():
        model.save_pretrained(folder)
        logits: torch.Tensor = model.merge_and_unload().eval()(IDS, use_cache=False).logits
    return logits


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_dora": True},
        {"use_rslora": True, "rank_pattern": {"qkv_proj": 2}, "alpha_pattern": {r"layers\.1\.mlp\.gate_up_proj": 9}},
        {"target_modules": ["o_proj", "gate_up_proj"], "modules_to_save": ["qkv_proj"]},
        {"target_modules": "all-linear"},
    ],
    ids=["lora", "dora", "patterns", "saved whole", "all linear"],
)
def test_the_parts_are_what_peft_merges(options: dict[str, Any], phi: Path, tmp_path: Path) -> None:
    expected = trained(phi, tmp_path / "adapter", **options)
    supernet = load_supernet(str(phi), adapters=[tmp_path / "adapter"])
    plan = SubnetPlan.full(supernet.architecture)
    assert float((expected - stock(phi)).abs().max()) > 0.1
    assert_same(masked_logits(supernet, plan, IDS), expected)
    assert_same(stock(write(materialize_subnet(supernet, plan), tmp_path / "out")), expected)


def test_cuts_have_their_rows_of_it(phi: Path, tmp_path: Path) -> None:
    trained(phi, tmp_path / "adapter")
    supernet = load_supernet(str(phi), adapters=[tmp_path / "adapter"])
    supernet = dataclasses.replace(supernet, strategy=noise_strategy(supernet.architecture))
    for name, plan in cuts(supernet).items():
        found = stock(write(materialize_subnet(supernet, plan), tmp_path / name))
        assert_same(found, masked_logits(supernet, plan, IDS))


def test_a_module_that_the_config_names_must_be_there(phi: Path, tmp_path: Path) -> None:
    trained(phi, tmp_path, target_modules=["o_proj"])
    config = json.loads((tmp_path / CONFIG).read_text()) | {"target_modules": ["o_proj", "qkv_proj"]}
    (tmp_path / CONFIG).write_text(json.dumps(config))
    with pytest.raises(DamagedFile, match=r"its config names model\.layers\.0\.self_attn\.qkv_proj"):
        load_supernet(str(phi), adapters=[tmp_path])


@pytest.mark.parametrize("options", [{}, {"target_modules": ["o_proj"], "modules_to_save": ["qkv_proj"]}])
def test_an_adapter_of_another_width_is_refused(options: dict[str, Any], phi: Path, tmp_path: Path) -> None:
    trained(phi, tmp_path, **options)
    weights = load_file(tmp_path / WEIGHTS)
    name = next(name for name in weights if "qkv_proj" in name and "lora_A" not in name)
    save_file({**weights, name: weights[name][:-16].clone()}, tmp_path / WEIGHTS)
    with pytest.raises(WrongModel, match=r"qkv_proj.* has shape \[112, "):
        load_supernet(str(phi), adapters=[tmp_path])


@pytest.mark.parametrize("options", [{}, {"target_modules": ["o_proj"], "modules_to_save": ["qkv_proj"]}])
def test_a_matrix_that_is_changed_twice_is_refused(options: dict[str, Any], phi: Path, tmp_path: Path) -> None:
    trained(phi, tmp_path, **options)
    weights = load_file(tmp_path / WEIGHTS)
    again = {name.replace("qkv", "q"): weight.clone() for name, weight in weights.items() if "qkv" in name}
    rows = {name: weight[:64] if "lora_A" not in name else weight for name, weight in again.items()}
    save_file({**weights, **{name: weight.clone() for name, weight in rows.items()}}, tmp_path / WEIGHTS)
    with pytest.raises(DamagedFile, match="which holds it"):
        load_supernet(str(phi), adapters=[tmp_path])
