"""Experts: what they are worth, what a cut of them writes, what it costs, and what is refused by name."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from amoeba_export.backends.analytic import work_of
from amoeba_export.calibrate.width import measure_importance, standardise
from amoeba_export.errors import (
    InputError,
    NotForExperts,
    NotRepresentable,
    UnsupportedAdapter,
    UnsupportedError,
    WeightsMismatch,
)
from amoeba_export.finetune import LowRankSettings, Settings, finetune_adapter
from amoeba_export.formats import FORMATS
from amoeba_export.formats.sizes import weight_bytes
from amoeba_export.ir import LayerPlan, Shape, SubnetPlan, Supernet, Workload
from amoeba_export.load import load_supernet
from amoeba_export.load.families import read_architecture
from amoeba_export.materialize import materialize_subnet
from amoeba_export.model.host import Host
from amoeba_export.model.layers import LayerStack
from amoeba_export.model.states import StateStore
from amoeba_export.profile.features import counts_of, dims_of, features
from amoeba_export.profile.memory import predict_memory_mb
from amoeba_export.refit import Draw, HealSettings, load_refit_recipe
from amoeba_export.refit.heal import heal
from amoeba_export.verify import masked_logits, verify_artifact
from tests.families.configs import SIZES, config_of, save_family
from tests.families.test_matrix import IDS, assert_same, stock
from tests.materialize.subnets import bare_plan, open_supernet, plan_for, write
from tests.model.models import random_samples, whole_model

SIZE, HIDDEN = 24, SIZES["hidden_size"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_family(tmp_path_factory.mktemp("experts"), "qwen3_moe")


@pytest.fixture
def supernet(folder: Path) -> Supernet:
    return open_supernet(folder)


def keeping(supernet: Supernet, experts: tuple[int, ...]) -> SubnetPlan:
    """All layers and heads, and these experts of each layer."""
    full = supernet.full_plan()
    layers = tuple(dataclasses.replace(layer, ffn=experts) for layer in full.layers)
    return dataclasses.replace(full, shape=Shape(4, 0.5), layers=layers)


@torch.no_grad()
def test_an_expert_is_worth_its_share_times_the_size_of_what_it_gives(supernet: Supernet, tmp_path: Path) -> None:
    samples = random_samples(count=4, length=10)
    stack = LayerStack(supernet, memory_bytes=10**9)
    states = StateStore(stack, samples, tmp_path / "states", limit_bytes=10**9)
    found = measure_importance(states, metric="WIFV", folder=tmp_path / "importance")
    model = whole_model(supernet)
    worth = torch.zeros(4, 6, dtype=torch.float64)
    share = torch.zeros(4, 6, dtype=torch.float64)
    for layer_idx, layer in enumerate(model.model.layers):

        def add(module: Any, inputs: Any, output: Any, layer_idx: int = layer_idx) -> None:
            x_TD, picked_TK, share_TK = inputs
            for token, rank in torch.cartesian_prod(torch.arange(len(x_TD)), torch.arange(2)).tolist():
                expert = int(picked_TK[token, rank])
                alone = module_output(module, x_TD[token], expert)
                share[layer_idx, expert] += float(share_TK[token, rank])
                worth[layer_idx, expert] += float(share_TK[token, rank]) * float(alone.double().norm())

        layer.mlp.experts.register_forward_hook(add)
    for batch in samples.batches:
        model(batch.tokens_BT, use_cache=False)
    assert torch.tensor(found.ffn_LF) == pytest.approx(torch.tensor(standardise((worth / 40).numpy())), abs=1e-5)
    assert torch.tensor(found.down_mean_LF).double() == pytest.approx(share / 40, abs=1e-6)
    assert float(share.sum()) == pytest.approx(4 * 40, rel=1e-6)  # they sum to one for each token of each layer


def module_output(module: Any, x_D: torch.Tensor, expert: int) -> torch.Tensor:
    gate, up = (module.gate_up_proj[expert] @ x_D).chunk(2)
    output: torch.Tensor = module.down_proj[expert] @ (torch.nn.functional.silu(gate) * up)
    return output


def test_a_uniform_cut_is_written_as_its_own_type_expert_by_expert(supernet: Supernet, tmp_path: Path) -> None:
    plan = keeping(supernet, (1, 4, 5))
    out = write(materialize_subnet(supernet, plan), tmp_path / "safetensors")
    config, weights = json.loads((out / "config.json").read_text()), load_file(out / "model.safetensors")
    assert (config["model_type"], config["num_experts"], config["num_experts_per_tok"]) == ("qwen3_moe", 3, 2)
    assert "num_local_experts" not in config
    assert config["moe_intermediate_size"] == SIZE
    source = load_file(supernet.folder / "model.safetensors")
    for new, old in enumerate((1, 4, 5)):
        for part in ("gate_proj", "up_proj", "down_proj"):
            name = "model.layers.2.mlp.experts.{}." + f"{part}.weight"
            assert torch.equal(weights[name.format(new)], source[name.format(old)])
    router = "model.layers.2.mlp.gate.weight"
    assert torch.equal(weights[router], source[router][[1, 4, 5]])
    report = verify_artifact(tmp_path, supernet, plan)
    assert report.greedy_tokens_equal
    assert report.max_rel_diff < 1e-4


def test_a_token_goes_through_no_more_experts_than_are_left(supernet: Supernet, tmp_path: Path) -> None:
    plan = keeping(supernet, (3,))
    out = write(materialize_subnet(supernet, plan), tmp_path / "out")
    config = json.loads((out / "config.json").read_text())
    assert (config["num_experts"], config["num_experts_per_tok"]) == (1, 1)
    assert_same(stock(out), masked_logits(supernet, plan, IDS))


def test_shares_that_are_not_scaled(tmp_path: Path) -> None:
    supernet = open_supernet(save_family(tmp_path / "source", "qwen3_moe", norm_topk_prob=False))
    assert not supernet.architecture.shares_sum_to_one
    assert_same(masked_logits(supernet, supernet.full_plan(), IDS), stock(supernet.folder))
    for i, plan in enumerate((keeping(supernet, (0, 2)), bare_plan(supernet))):
        out = write(materialize_subnet(supernet, plan), tmp_path / str(i))
        assert_same(stock(out), masked_logits(supernet, plan, IDS))


def test_experts_get_no_bias_for_what_is_gone(supernet: Supernet) -> None:
    names = [spec.name for spec in materialize_subnet(supernet, plan_for(supernet, "3x0.6")).specs]
    assert "model.layers.0.self_attn.o_proj.bias" in names
    assert not [name for name in names if "mlp" in name and name.endswith("bias")]


def test_a_width_keeps_whole_experts_whatever_a_device_aligns_neurons_to(supernet: Supernet) -> None:
    from amoeba_export.ir.derive import CutRules, derive_plan

    assert supernet.strategy is not None
    plans = [derive_plan(supernet.strategy, supernet.architecture, Shape(3, 0.6), CutRules(align=a)) for a in (1, 32)]
    assert plans[0] == plans[1]
    assert all(len(layer.ffn) == 4 for layer in plans[0].layers)


def test_both_names_of_the_number_of_experts_are_read(supernet: Supernet) -> None:
    config = json.loads((supernet.folder / "config.json").read_text())
    assert config["num_local_experts"] == 6
    config["num_experts"] = config.pop("num_local_experts")
    where = supernet.folder / "config.json"
    assert read_architecture(config, where=where)[0] == supernet.architecture


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"num_experts_per_tok": 7}, "a token cannot go through 7 of 6 experts"),
        ({"num_experts_per_tok": 0}, "a token cannot go through 0 of 6 experts"),
        ({"num_local_experts": 2**16}, "65536 experts in each of 4 layers are too many"),
        ({"moe_intermediate_size": -1}, "expert_size is -1"),
        ({"decoder_sparse_step": 2}, "A qwen3_moe with decoder_sparse_step = 2 is not supported"),
        ({"mlp_only_layers": [0]}, r"A qwen3_moe with mlp_only_layers = \[0\] is not supported"),
    ],
)
def test_configs_that_cannot_be(supernet: Supernet, changed: dict[str, Any], message: str) -> None:
    where = supernet.folder / "config.json"
    config = json.loads(where.read_text()) | changed
    with pytest.raises((InputError, UnsupportedError), match=message):
        read_architecture(config, where=where)


def test_an_expert_that_is_missing_is_named(folder: Path, tmp_path: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.experts.3.up_proj.weight"]
    save_file(weights, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    with pytest.raises(WeightsMismatch, match=r"model\.layers\.1\.mlp\.experts\.3\.up_proj\.weight is missing"):
        load_supernet(str(tmp_path))


def test_a_step_reads_and_computes_the_experts_that_are_picked(supernet: Supernet) -> None:
    dense = supernet.architecture.uncut
    expert, head = 3 * HIDDEN * SIZE, 128 * HIDDEN
    workload = Workload(prompt_tokens=4, generate_tokens=4)
    bytes_of = weight_bytes(dense, ("safetensors",), "fp32")
    assert bytes_of.total == 4 * dense.num_params
    assert dense.num_params == sum(
        parameter.numel() for parameter in whole_model(supernet).parameters()
    )  # all experts are stored
    work = work_of(dense, 1, workload, weights=bytes_of)
    cache = 4 * 4 * (4 * 16 * 2)
    assert work.memory_bytes == pytest.approx(4 * (dense.num_params - head - 4 * 4 * expert) + cache)
    assert work.flops == pytest.approx(2 * (dense.num_params - head - 4 * 4 * expert) + 4 * 16 * 4 * 4 * 4)
    prompt = work_of(dense, 64, workload, weights=bytes_of)
    assert prompt.memory_bytes > 4 * (dense.num_params - head) * 0.999  # 64 tokens pick every expert


def test_memory_counts_stored_experts_and_activations_of_active_ones(supernet: Supernet) -> None:
    workload = Workload(prompt_tokens=64, generate_tokens=4)
    wide = dataclasses.replace(supernet.architecture, experts_per_token=6, vocab_size=2)
    narrow = dataclasses.replace(wide, experts_per_token=1)
    given = {"weight_bytes": 1 << 20, "dtype": "fp32", "workload": workload}
    found = [predict_memory_mb(one.uncut, **given) for one in (narrow, wide)]  # type: ignore[arg-type]
    assert (found[1] - found[0]) * 2**20 == pytest.approx(64 * 3 * 5 * SIZE * 4)


def test_cost_tables_tell_active_experts_from_stored_ones(supernet: Supernet) -> None:
    architecture = supernet.architecture
    dims = dims_of(architecture)
    assert (dims["expert_size"], dims["experts_per_token"]) == (SIZE, 2)
    whole = features(counts_of(architecture.uncut), dims, "decode", 128)
    half = features(counts_of(keeping(supernet, (0, 1, 2)).dense(architecture)), dims, "decode", 128)
    one = features(counts_of(keeping(supernet, (0,)).dense(architecture)), dims, "decode", 128)
    assert (whole["ffn"], half["ffn"], one["ffn"]) == (4, 4, 2)
    assert (whole["experts"], half["experts"]) == (4, 2)


def test_precisions_that_hold_no_experts_say_so(supernet: Supernet) -> None:
    dense = supernet.architecture.uncut
    for name, dtype in (("onnx", "int4"), ("onnx", "int8"), ("safetensors", "w4a16")):
        with pytest.raises(NotRepresentable, match=r"weights of experts are not|packed weights of a qwen3_moe"):
            FORMATS[name].check(dense, dtype=dtype)


@pytest.mark.parametrize("module", ["mlp.experts.2.gate_proj", "mlp.gate"])
def test_adapters_of_experts_are_refused_by_name(supernet: Supernet, module: str, tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": [module.rpartition(".")[2]]})
    )
    name = f"base_model.model.model.layers.1.{module}.lora_"
    weights = {f"{name}A.weight": torch.ones(2, HIDDEN), f"{name}B.weight": torch.ones(6, 2)}
    save_file(weights, tmp_path / "adapter_model.safetensors")
    with pytest.raises(UnsupportedAdapter, match="a change of experts or of what picks them"):
        load_supernet(str(supernet.folder), adapters=[tmp_path])


def test_training_leaves_experts_alone(supernet: Supernet, tmp_path: Path) -> None:
    settings = Settings(low_rank=LowRankSettings(targets=("q_proj", "down_proj")))
    with pytest.raises(NotForExperts, match="The experts of a model cannot be adapted"):
        finetune_adapter(supernet, data=tmp_path / "none", out=tmp_path / "out", settings=settings)


def test_experts_are_not_healed(supernet: Supernet) -> None:
    """By the engine itself, whoever calls it, before a text is read."""
    plan, draw = plan_for(supernet, "3x1"), Draw(recipe=load_refit_recipe("fast"))
    with pytest.raises(NotForExperts, match="The experts of a model cannot be healed"):
        heal(supernet, plan, (), draw, HealSettings(), take=list, host=Host())


def test_a_layer_may_lose_all_its_experts(supernet: Supernet, tmp_path: Path) -> None:
    full = supernet.full_plan()
    first, *rest = full.layers
    gone = LayerPlan(source_layer=0, query_heads=first.query_heads, kv_heads=first.kv_heads, ffn=())
    plan = dataclasses.replace(full, shape=Shape(4, 0.9), policy="adaptive", layers=(gone, *rest))
    out = write(materialize_subnet(supernet, plan), tmp_path / "out")
    assert json.loads((out / "config.json").read_text())["model_type"] == "amoeba"
    assert_same(stock(out), masked_logits(supernet, plan, IDS))


def test_the_config_that_transformers_makes_is_read(supernet: Supernet) -> None:
    theirs = config_of("qwen3_moe")
    ours = supernet.architecture
    assert (ours.ffn_size, ours.expert_size) == (theirs.num_experts, theirs.moe_intermediate_size)
    assert (ours.experts_per_token, ours.shares_sum_to_one) == (theirs.num_experts_per_tok, theirs.norm_topk_prob)
