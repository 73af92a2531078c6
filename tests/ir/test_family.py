"""Roles of weights, and the facts of a model: found by name, written as JSON, read again."""

from __future__ import annotations

import dataclasses
import json

import pytest

from amoeba_export.ir import Architecture, LayerKind, Rope
from amoeba_export.ir.family import LAYER_ROLES, LINEARS, Fused, Place, QueryTemperature, block_of
from amoeba_export.ir.features import features_of
from amoeba_export.load.family_file import read_family, supported_families

PLAIN = Architecture(
    family="llama",
    num_layers=3,
    hidden_size=16,
    num_heads=2,
    num_kv_heads=1,
    head_dim=8,
    ffn_size=24,
    vocab_size=32,
    max_positions=64,
    norm_eps=1e-5,
    rope_theta=1e4,
)
GLOBAL = LayerKind(rope=Rope(theta=1e6, scaling={"rope_type": "linear", "factor": 8.0}, dims=8))
LOCAL = LayerKind(name="sliding_attention", window=4, rope=Rope(theta=1e4, dims=8))
ODD = dataclasses.replace(
    PLAIN,
    kinds=(GLOBAL, LOCAL),
    kind_of_layer=(1, 1, 0),
    norm_offset=1.0,
    output_norms=True,
    qk_norm=True,
    activation="gelu_tanh",
    attention_scale=0.5,
    final_softcap=30.0,
    embedding_scale=4.0,
    query_temperature=QueryTemperature(beta=0.1, length=16),
)


@pytest.mark.parametrize("model_type", supported_families())
def test_every_weight_of_a_family_is_found_by_its_name_and_has_a_role_of_its_own(model_type: str):
    family = read_family(model_type).family
    for template in family.templates:
        layer = 11 if "{layer}" in template.name else None
        name = template.name.format(layer=layer)
        part = name.rpartition(".")[2]
        assert family.find(name) == Place(template.role, layer, part)  # type: ignore[arg-type]
        assert (family.weight if part == "weight" else family.bias)(template.role, layer) == name
        assert (block_of(template.role) is None) == (layer is None)
    assert all(family.has(role) for role in LINEARS)


def test_a_name_of_no_weight_is_not_found():
    family = read_family("llama").family
    assert family.find("model.layers.0.self_attn.rotary_emb.inv_freq") is None
    assert family.find("model.layers.x.mlp.up_proj.weight") is None
    assert family.find("model.norm.scale") is None
    with pytest.raises(KeyError):
        family.place("model.layers.0.mlp.experts.weight")


def test_a_bias_that_only_a_cut_has_is_found():
    assert read_family("qwen3").family.place("model.layers.2.mlp.down_proj.bias") == Place("down", 2, "bias")


def test_blocks_share_no_role():
    assert not set(LAYER_ROLES["attention"]) & set(LAYER_ROLES["ffn"])
    assert Fused(module="qkv", roles=("q", "k", "v")).roles == ("q", "k", "v")


def test_llama_has_one_kind_of_layer_and_no_feature_of_its_own():
    assert features_of(PLAIN) == frozenset()
    assert PLAIN.layer_kinds == (LayerKind(rope=Rope(theta=1e4, dims=8)),)
    assert PLAIN.score_scale == 8**-0.5
    windowed = dataclasses.replace(PLAIN, sliding_window=5, rotary_dims=4)
    assert windowed.kind(2) == LayerKind(name="sliding_attention", window=5, rope=Rope(theta=1e4, dims=4))
    assert features_of(windowed) == {"partial_rotary"}


def test_what_a_model_needs_is_named():
    assert features_of(ODD) == {
        *("norm_offset", "output_norms", "activation", "attention_scale", "final_softcap", "layer_kinds"),
        *("embedding_scale", "query_temperature"),
    }
    assert dataclasses.replace(PLAIN, qk_norm=True, qk_norm_scope="whole").cuts_heads is False
    assert [ODD.kind(i).window for i in range(3)] == [4, 4, None]


def test_layers_of_a_cut_know_their_kind_and_are_uniform_all_the_same():
    dense = ODD.uncut
    assert [layer.kind for layer in dense.layers] == [1, 1, 0]
    assert dense.is_uniform
    assert dense.has_whole_layers
    assert dense.kind(dense.layers[2]) == GLOBAL
    # per layer: q 256, k and v 128 each, o 256, FFN 1152; four norms of 16 and two of 8
    assert dense.num_params == 2 * 32 * 16 + 16 + 3 * (768 + 3 * 16 * 24 + 4 * 16 + 2 * 8)


def test_facts_are_read_as_they_were_written():
    assert Architecture.from_facts(json.loads(json.dumps(ODD.facts()))) == ODD


def test_facts_that_are_those_of_llama_are_not_written():
    assert set(PLAIN.facts()) == {
        *("family", "num_layers", "hidden_size", "num_heads", "num_kv_heads", "head_dim", "ffn_size", "vocab_size"),
        *("max_positions", "norm_eps", "rope_theta", "rope_scaling", "sliding_window", "tied_embeddings"),
        *("qkv_bias", "o_bias", "mlp_bias", "qk_norm"),
    }
