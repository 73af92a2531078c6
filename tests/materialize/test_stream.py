from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from amoeba_export.errors import InputError, NonFiniteWeights, WrongModel
from amoeba_export.ir import AdapterDelta, Shape, SubnetPlan, Supernet
from amoeba_export.load import load_supernet
from amoeba_export.materialize import materialize_subnet, stream_subnets
from tests.materialize.subnets import MemoryAdapter, bare_plan, noise_adapter, open_supernet, plan_for
from tests.tiny import FAMILIES, save_tiny, tiny_model


@pytest.fixture(params=FAMILIES)
def supernet(request: pytest.FixtureRequest, tiny_dirs: dict[str, Path]) -> Supernet:
    return open_supernet(tiny_dirs[request.param])


@pytest.fixture
def llama(tiny_dirs: dict[str, Path]) -> Supernet:
    return open_supernet(tiny_dirs["llama"])


def _weights(supernet: Supernet, plan: SubnetPlan) -> dict[str, torch.Tensor]:
    return dict(materialize_subnet(supernet, plan).stream())


def test_the_full_plan_passes_every_weight_on_unchanged(supernet: Supernet) -> None:
    weights = _weights(supernet, SubnetPlan.full(supernet.architecture))
    assert set(weights) == set(supernet.tensors.names())
    for name, weight in weights.items():
        assert torch.equal(weight, supernet.tensors.read(name)), name


@pytest.mark.parametrize(("shape", "policy"), [("3x1", "uniform"), ("4x0.6", "uniform"), ("3x0.5", "adaptive")])
def test_specs_name_the_stream_in_order(supernet: Supernet, shape: str, policy: str) -> None:
    subnet = materialize_subnet(supernet, plan_for(supernet, shape, policy))
    streamed = [(name, tuple(weight.shape)) for name, weight in subnet.stream()]
    assert streamed == [(spec.name, spec.shape) for spec in subnet.specs]
    assert subnet.architecture.num_params == sum(torch.Size(spec.shape).numel() for spec in subnet.specs)


def test_dropped_layers_are_renumbered(llama: Supernet) -> None:
    plan = plan_for(llama, "3x1")
    assert plan.kept_layers == (0, 2, 3)
    weights = _weights(llama, plan)
    name = "model.layers.{}.mlp.up_proj.weight"
    assert torch.equal(weights[name.format(1)], llama.tensors.read(name.format(2)))
    assert name.format(3) not in weights


def test_cut_rows_columns_and_biases_follow_the_plan(llama: Supernet) -> None:
    plan = plan_for(llama, "4x0.5")
    weights, layer, head_dim = _weights(llama, plan), plan.layers[2], llama.architecture.head_dim
    prefix = "model.layers.2"
    read = llama.tensors.read
    query = [head * head_dim + i for head in layer.query_heads for i in range(head_dim)]
    kv = [head * head_dim + i for head in layer.kv_heads for i in range(head_dim)]
    ffn = list(layer.ffn)
    expected = {
        "self_attn.q_proj": read(f"{prefix}.self_attn.q_proj.weight")[query],
        "self_attn.k_proj": read(f"{prefix}.self_attn.k_proj.weight")[kv],
        "self_attn.v_proj": read(f"{prefix}.self_attn.v_proj.weight")[kv],
        "self_attn.o_proj": read(f"{prefix}.self_attn.o_proj.weight")[:, query],
        "mlp.gate_proj": read(f"{prefix}.mlp.gate_proj.weight")[ffn],
        "mlp.up_proj": read(f"{prefix}.mlp.up_proj.weight")[ffn],
        "mlp.down_proj": read(f"{prefix}.mlp.down_proj.weight")[:, ffn],
    }
    for module, weight in expected.items():
        assert torch.equal(weights[f"{prefix}.{module}.weight"], weight), module
    assert llama.strategy is not None and llama.strategy.importance is not None
    for module, means, kept in (
        ("self_attn.o_proj", llama.strategy.importance.o_mean_LQ[2], query),
        ("mlp.down_proj", llama.strategy.importance.down_mean_LF[2], ffn),
    ):
        gone = sorted(set(range(len(means))) - set(kept))
        bias = read(f"{prefix}.{module}.weight")[:, gone].double() @ torch.from_numpy(means[gone]).double()
        torch.testing.assert_close(weights[f"{prefix}.{module}.bias"].double(), bias, rtol=1e-5, atol=1e-5)


def test_qwen_qkv_biases_lose_the_rows_of_their_heads(tiny_dirs: dict[str, Path]) -> None:
    supernet = open_supernet(tiny_dirs["qwen2"])
    plan = plan_for(supernet, "4x0.5")
    bias = _weights(supernet, plan)["model.layers.0.self_attn.k_proj.bias"]
    (head,) = plan.layers[0].kv_heads
    size = supernet.architecture.head_dim
    source = supernet.tensors.read("model.layers.0.self_attn.k_proj.bias")
    assert torch.equal(bias, source[head * size : (head + 1) * size])


def test_a_source_bias_and_the_compensation_add_up(tmp_path: Path) -> None:
    supernet = open_supernet(save_tiny(tmp_path, "llama", attention_bias=True, mlp_bias=True))
    plan = plan_for(supernet, "4x0.5")
    without = dataclasses.replace(plan, compensate=False)
    name = "model.layers.1.mlp.down_proj.bias"
    plain = _weights(supernet, without)[name]
    assert torch.equal(plain, supernet.tensors.read(name))
    gone = sorted(set(range(96)) - set(plan.layers[1].ffn))
    assert supernet.strategy is not None and supernet.strategy.importance is not None
    mean = torch.from_numpy(supernet.strategy.importance.down_mean_LF[1][gone])
    extra = supernet.tensors.read("model.layers.1.mlp.down_proj.weight")[:, gone] @ mean
    torch.testing.assert_close(_weights(supernet, plan)[name], plain + extra, rtol=1e-5, atol=1e-5)


def test_a_block_that_is_gone_leaves_its_bias_and_nothing_else(llama: Supernet) -> None:
    names = set(_weights(llama, bare_plan(llama)))
    assert {name for name in names if name.startswith("model.layers.1.")} == {
        "model.layers.1.self_attn.o_proj.bias",
        "model.layers.1.post_attention_layernorm.weight",
        "model.layers.1.mlp.gate_proj.weight",
        "model.layers.1.mlp.up_proj.weight",
        "model.layers.1.mlp.down_proj.weight",
        "model.layers.1.mlp.down_proj.bias",
    }
    assert {name for name in names if name.startswith("model.layers.2.mlp")} == {"model.layers.2.mlp.down_proj.bias"}
    assert "model.layers.2.post_attention_layernorm.weight" not in names


def test_several_plans_in_one_pass_read_each_weight_once(llama: Supernet) -> None:
    plans = [plan_for(llama, "4x0.5"), plan_for(llama, "3x0.75"), bare_plan(llama)]
    reads: list[str] = []

    class Counting:
        def __getattr__(self, name: str) -> object:
            return getattr(llama.tensors, name)

        def read(self, name: str) -> torch.Tensor:
            reads.append(name)
            return llama.tensors.read(name)

    counted = dataclasses.replace(llama, tensors=Counting(), adapters=(noise_adapter(llama),))
    together: list[dict[str, torch.Tensor]] = [{} for _ in plans]
    for plan_idx, name, weight in stream_subnets(counted, plans):
        together[plan_idx][name] = weight
    assert sorted(reads) == sorted(llama.tensors.names())
    for plan, weights in zip(plans, together, strict=True):
        alone = _weights(counted, plan)
        assert alone.keys() == weights.keys()
        assert all(torch.equal(alone[name], weight) for name, weight in weights.items())


def test_biases_come_from_base_weights_not_merged_ones(llama: Supernet) -> None:
    plan = plan_for(llama, "4x0.5")
    merged = _weights(dataclasses.replace(llama, adapters=(noise_adapter(llama),)), plan)
    plain = _weights(llama, plan)
    for name in plain:
        assert torch.equal(merged[name], plain[name]) == ("_proj.weight" not in name), name


def test_a_dtype_applies_to_every_weight(llama: Supernet) -> None:
    subnet = materialize_subnet(llama, plan_for(llama, "4x0.5"), dtype=torch.bfloat16)
    assert {weight.dtype for _, weight in subnet.stream()} == {torch.bfloat16} == {subnet.source_dtype}


def test_a_stream_can_be_dropped_and_opened_again(llama: Supernet) -> None:
    subnet = materialize_subnet(llama, plan_for(llama, "4x0.5"))
    stream = subnet.stream()
    next(stream)
    del stream
    assert len(dict(subnet.stream())) == len(subnet.specs)


def test_a_broken_adapter_is_named_with_the_weight_it_breaks(llama: Supernet) -> None:
    nan = AdapterDelta(a_RI=torch.full((1, 96), torch.nan), b_OR=torch.ones(192, 1), scale=1.0)
    adapter = MemoryAdapter({"model.layers.1.self_attn.q_proj": nan})
    with pytest.raises(NonFiniteWeights) as caught:
        _weights(dataclasses.replace(llama, adapters=(adapter,)), SubnetPlan.full(llama.architecture))
    assert str(caught.value) == (
        "The weight model.layers.1.self_attn.q_proj.weight is not finite: an adapter or a bias made it so for 4x1.\n"
        "  next:  Get the file again, or train it again."
    )


def test_an_adapter_of_another_model_is_refused_before_any_work(llama: Supernet) -> None:
    adapter = MemoryAdapter(
        {"model.layers.9.mlp.up_proj": AdapterDelta(a_RI=torch.ones(1, 1), b_OR=torch.ones(1, 1), scale=1)}
    )
    with pytest.raises(WrongModel, match=r"it changes model\.layers\.9\.mlp\.up_proj, which is not here"):
        materialize_subnet(dataclasses.replace(llama, adapters=(adapter,)), SubnetPlan.full(llama.architecture))


def test_a_plan_of_another_model_is_refused(llama: Supernet) -> None:
    plan = dataclasses.replace(SubnetPlan.full(llama.architecture), model_id="f" * 64)
    with pytest.raises(WrongModel, match="The plan was made for another model"):
        materialize_subnet(llama, plan)


def test_compensation_without_a_strategy_is_refused(llama: Supernet) -> None:
    plan = plan_for(llama, "4x0.5")
    with pytest.raises(InputError, match="no strategy with input means is given"):
        _weights(dataclasses.replace(llama, strategy=None), plan)


def test_a_width_that_the_strategy_does_not_list_is_refused(llama: Supernet) -> None:
    plan = dataclasses.replace(plan_for(llama, "4x0.5"), width_key=0.5, shape=Shape(4, 0.5))
    with pytest.raises(InputError, match=r"width 0\.5, which this strategy does not have"):
        _weights(llama, plan)


def test_bf16_sources_stay_bf16_and_merge_in_fp32(tmp_path: Path) -> None:
    tiny_model("llama").bfloat16().save_pretrained(tmp_path)
    supernet = load_supernet(str(tmp_path))
    supernet = dataclasses.replace(supernet, adapters=(noise_adapter(supernet),))
    plan = SubnetPlan.full(supernet.architecture)
    name = "model.layers.0.mlp.up_proj"
    delta = supernet.adapters[0].delta(name, plan)
    assert delta is not None
    exact = supernet.tensors.read(f"{name}.weight").float() + delta.scale * delta.b_OR @ delta.a_RI
    weight = _weights(supernet, plan)[f"{name}.weight"]
    assert weight.dtype is torch.bfloat16
    torch.testing.assert_close(weight.float(), exact, rtol=2**-8, atol=1e-6)
    wide = dict(materialize_subnet(supernet, plan, dtype=torch.float32).stream())[f"{name}.weight"]
    torch.testing.assert_close(wide, exact)
