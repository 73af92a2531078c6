"""Which stock model a plan becomes, and what its config.json says."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import transformers

from amoeba_export.errors import UnsupportedModel
from amoeba_export.formats import FORMATS
from amoeba_export.formats.config import dense_config, graph_config
from amoeba_export.formats.model_type import container_type, num_zero_biases, zero_biases
from amoeba_export.ir import Architecture, DenseArchitecture, LayerDims, SubnetPlan
from amoeba_export.load.family_file import read_family, supported_families
from amoeba_export.materialize import materialize_subnet
from tests.materialize.subnets import open_supernet, plan_for
from tests.tiny import save_tiny

LLAMA = Architecture(
    family="llama",
    num_layers=2,
    hidden_size=64,
    num_heads=4,
    num_kv_heads=4,
    head_dim=16,
    ffn_size=96,
    vocab_size=128,
    max_positions=256,
    norm_eps=1e-5,
    rope_theta=1e4,
)
NAMES = read_family("llama").family
QWEN2 = dataclasses.replace(LLAMA, family="qwen2", qkv_bias=True)
QWEN3 = dataclasses.replace(LLAMA, family="qwen3", qk_norm=True)
MISTRAL = dataclasses.replace(LLAMA, family="mistral")
WINDOW = dataclasses.replace(MISTRAL, sliding_window=32)
WINDOW2 = dataclasses.replace(QWEN2, sliding_window=32)

WHOLE = LayerDims(num_heads=4, num_kv_heads=4, ffn_size=96)
TWO = LayerDims(num_heads=2, num_kv_heads=2, ffn_size=64)
TWO_BIASED = dataclasses.replace(TWO, o_bias=True, down_bias=True)
THREE = LayerDims(num_heads=3, num_kv_heads=3, ffn_size=64)
THREE_BIASED = dataclasses.replace(THREE, o_bias=True, down_bias=True)


def _dense(base: Architecture, *layers: LayerDims) -> DenseArchitecture:
    return DenseArchitecture(
        base=base, layers=tuple(dataclasses.replace(dims, qkv_bias=base.qkv_bias) for dims in layers)
    )


@pytest.mark.parametrize(
    ("base", "layers", "expected"),
    [
        (LLAMA, (WHOLE,), "llama"),
        (LLAMA, (TWO, TWO), "llama"),
        (LLAMA, (TWO_BIASED, TWO_BIASED), "llama"),
        (LLAMA, (THREE,), "mistral"),
        (LLAMA, (THREE_BIASED,), "granite"),
        (LLAMA, (TWO, THREE), "amoeba"),
        (LLAMA, (TWO_BIASED, TWO), "amoeba"),
        (LLAMA, (LayerDims(num_heads=0, num_kv_heads=0, ffn_size=96),), "amoeba"),
        (LLAMA, (LayerDims(num_heads=4, num_kv_heads=4, ffn_size=0),), "amoeba"),
        (MISTRAL, (WHOLE, WHOLE), "mistral"),
        (MISTRAL, (THREE,), "mistral"),
        (MISTRAL, (TWO_BIASED,), "llama"),
        (WINDOW, (WHOLE,), "mistral"),
        (WINDOW, (TWO,), "mistral"),
        (WINDOW, (TWO_BIASED,), "amoeba"),
        (QWEN2, (WHOLE,), "qwen2"),
        (QWEN2, (THREE,), "qwen2"),
        (QWEN2, (TWO_BIASED,), "llama"),
        (QWEN2, (THREE_BIASED,), "granite"),
        (WINDOW2, (TWO,), "qwen2"),
        (WINDOW2, (TWO_BIASED,), "amoeba"),
        (QWEN3, (WHOLE,), "qwen3"),
        (QWEN3, (THREE,), "qwen3"),
        (QWEN3, (dataclasses.replace(WHOLE, num_heads=2, num_kv_heads=2, o_bias=True),), "qwen3"),
        (QWEN3, (TWO_BIASED,), "amoeba"),
    ],
)
def test_container(base: Architecture, layers: tuple[LayerDims, ...], expected: str) -> None:
    assert container_type(_dense(base, *layers)) == expected


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("layers", [(WHOLE,), (TWO_BIASED,), (THREE,), (TWO, THREE)])
def test_a_family_that_nobody_writes_is_refused_by_name(name: str, layers: tuple[LayerDims, ...]) -> None:
    dense = _dense(dataclasses.replace(LLAMA, family="gemma9"), *layers)
    with pytest.raises(UnsupportedModel, match="Models of type 'gemma9' are not supported"):
        FORMATS[name].check(dense, dtype="fp32")
    with pytest.raises(UnsupportedModel, match="'gemma9'"):
        container_type(dense)


@pytest.mark.parametrize("family", supported_families())
def test_every_family_that_is_read_names_its_class(family: str) -> None:
    assert hasattr(transformers, read_family(family).class_name)


def test_stock_types_get_the_biases_that_they_insist_on_as_zeros() -> None:
    names = {spec.name: spec.shape for spec in zero_biases(_dense(LLAMA, TWO_BIASED), NAMES)}
    assert names == {
        "model.layers.0.self_attn.q_proj.bias": (32,),
        "model.layers.0.self_attn.k_proj.bias": (32,),
        "model.layers.0.self_attn.v_proj.bias": (32,),
        "model.layers.0.mlp.gate_proj.bias": (64,),
        "model.layers.0.mlp.up_proj.bias": (64,),
    }
    only_ffn = dataclasses.replace(WHOLE, ffn_size=64, down_bias=True)
    assert {spec.name for spec in zero_biases(_dense(QWEN2, only_ffn), NAMES)} == {
        "model.layers.0.self_attn.o_proj.bias",
        "model.layers.0.mlp.gate_proj.bias",
        "model.layers.0.mlp.up_proj.bias",
    }
    for dense in (_dense(LLAMA, TWO), _dense(LLAMA, TWO_BIASED, TWO), _dense(QWEN3, WHOLE)):
        assert not list(zero_biases(dense, NAMES))
        assert num_zero_biases(dense) == 0


def test_rope_is_written_in_both_spellings(tmp_path: Path) -> None:
    scaling = {"rope_type": "linear", "factor": 2.0}
    supernet = open_supernet(save_tiny(tmp_path, rope_parameters={**scaling, "rope_theta": 12345.0}))
    for shape in ("3x1", "4x0.6"):
        config = dense_config(materialize_subnet(supernet, plan_for(supernet, shape)), dtype="float32")
        assert config["rope_theta"] == 12345.0
        assert config["rope_scaling"] == scaling
        assert config["rope_parameters"] == {**scaling, "rope_theta": 12345.0}


def test_plain_rope_has_no_scaling(tiny_dirs: dict[str, Path]) -> None:
    supernet = open_supernet(tiny_dirs["llama"])
    config = dense_config(materialize_subnet(supernet, plan_for(supernet, "4x0.6")), dtype="float32")
    assert config["rope_parameters"] == {"rope_type": "default", "rope_theta": config["rope_theta"]}
    assert "rope_scaling" not in config


def test_depth_only_keeps_what_we_do_not_interpret(tmp_path: Path) -> None:
    supernet = open_supernet(save_tiny(tmp_path, "qwen2", initializer_range=0.011, attention_dropout=0.25))
    plan = plan_for(supernet, "2x1")
    config = dense_config(materialize_subnet(supernet, plan), dtype="float32")
    assert config["initializer_range"] == 0.011
    assert config["attention_dropout"] == 0.25
    assert config["num_hidden_layers"] == len(config["layer_types"]) == 2
    assert "transformers_version" not in config


def test_amoeba_lists_every_layer(tiny_dirs: dict[str, Path]) -> None:
    supernet = open_supernet(tiny_dirs["qwen3"])
    plan: SubnetPlan = plan_for(supernet, "4x0.5", "adaptive")
    config = dense_config(materialize_subnet(supernet, plan), dtype="float32")
    assert config["model_type"] == "amoeba"
    assert config["layer_query_heads"] == [len(layer.query_heads) for layer in plan.layers]
    assert config["layer_ffn_sizes"] == [len(layer.ffn) for layer in plan.layers]
    assert config["qk_norm"] is True
    assert config["auto_map"]["AutoModelForCausalLM"] == "modeling_amoeba.AmoebaForCausalLM"


@pytest.mark.parametrize(("family", "shape"), [("llama", "3x0.5"), ("qwen3", "4x1"), ("qwen3", "3x0.5")])
def test_a_graph_has_a_config_from_which_optimum_gets_the_shape_of_its_cache(
    family: str, shape: str, tiny_dirs: dict[str, Path]
) -> None:
    """optimum-onnx takes hidden size / heads for the head dim, and wants no code of ours."""
    supernet = open_supernet(tiny_dirs[family])
    subnet = materialize_subnet(supernet, plan_for(supernet, shape))
    config = graph_config(subnet, dtype="float32")
    dims = subnet.architecture.layers[0]
    assert (config["model_type"], "auto_map" in config) == (family, False)
    assert (config["num_attention_heads"], config["num_key_value_heads"]) == (dims.num_heads, dims.num_kv_heads)
    assert (
        config["hidden_size"] // config["num_attention_heads"] == config["head_dim"] == supernet.architecture.head_dim
    )
