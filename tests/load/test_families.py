from __future__ import annotations

import copy
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from amoeba_export.errors import InputError, UnsupportedError, UnsupportedModel
from amoeba_export.formats.onnx.rope import rope_table
from amoeba_export.ir import Architecture
from amoeba_export.load.families import expected_weights, matrix_shapes, read_architecture, tied_copies
from amoeba_export.load.family_file import read_family, supported_families
from tests.tiny import FAMILIES, tiny_config

WHERE = Path("config.json")
SMALL = {
    "num_hidden_layers": 2,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "intermediate_size": 96,
    "vocab_size": 128,
}


def small(model_type: str = "llama", **keys: Any) -> dict[str, Any]:
    return {"model_type": model_type, **SMALL, "num_key_value_heads": 2, **keys}


def read(config: dict[str, Any]) -> Architecture:
    return read_architecture(config, where=WHERE)[0]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_config_of_transformers_5_is_read_as_transformers_reads_it(family: str):
    config = tiny_config(family)
    ours = read(config.to_dict())
    assert ours == Architecture(
        family=config.model_type,
        num_layers=config.num_hidden_layers,
        hidden_size=config.hidden_size,
        num_heads=config.num_attention_heads,
        num_kv_heads=config.num_key_value_heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
        ffn_size=config.intermediate_size,
        vocab_size=config.vocab_size,
        max_positions=config.max_position_embeddings,
        norm_eps=config.rms_norm_eps,
        rope_theta=config.rope_parameters["rope_theta"],
        tied_embeddings=config.tie_word_embeddings,
        qkv_bias=family == "qwen2",
        qk_norm=family == "qwen3",
    )


@pytest.mark.parametrize("model_type", ["llama", "mistral", "qwen2", "qwen3"])
def test_keys_that_a_config_leaves_out_mean_what_transformers_means(model_type: str):
    keys = SMALL | {"hidden_size": 4096, "num_attention_heads": 32}
    theirs = AutoConfig.for_model(model_type, **keys)
    ours = read({"model_type": model_type, **keys})
    assert ours.num_kv_heads == theirs.num_key_value_heads
    assert ours.head_dim == getattr(theirs, "head_dim", 128)
    assert ours.max_positions == theirs.max_position_embeddings
    assert ours.norm_eps == theirs.rms_norm_eps
    assert ours.rope_theta == theirs.rope_parameters["rope_theta"]
    assert ours.tied_embeddings == theirs.tie_word_embeddings
    assert ours.sliding_window == theirs.sliding_window if model_type != "llama" else ours.sliding_window is None


@pytest.mark.parametrize(
    ("model_type", "flags"),
    [
        *(("llama", flags) for flags in itertools.product((False, True), repeat=3)),
        *(("qwen3", (bias, False, tied)) for bias in (False, True) for tied in (False, True)),
        *((name, (False, False, tied)) for name in ("mistral", "qwen2") for tied in (False, True)),
    ],
)
def test_the_weights_that_a_config_implies_are_those_that_transformers_builds(
    model_type: str, flags: tuple[bool, bool, bool]
):
    attention_bias, mlp_bias, tied = flags
    keys = small(model_type, tie_word_embeddings=tied)
    if model_type in ("llama", "qwen3"):
        keys["attention_bias"] = attention_bias
    if model_type == "llama":
        keys["mlp_bias"] = mlp_bias
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**keys))
    architecture, file = read_architecture(keys, where=WHERE)
    built = {name: tuple(weight.shape) for name, weight in model.state_dict().items()}
    if tied:
        assert tied_copies(file.family, architecture) == {"lm_head.weight": "model.embed_tokens.weight"}
        del built["lm_head.weight"]
    assert expected_weights(file.family, architecture) == built
    assert set(matrix_shapes(file.family, architecture)) == {
        name
        for name, module in model.named_modules()
        if type(module).__name__ in ("Linear", "Embedding") and not (tied and name == "lm_head")
    }


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
@pytest.mark.parametrize(
    "key",
    [
        *("num_hidden_layers", "hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim", "vocab_size"),
        *("intermediate_size", "max_position_embeddings", "rms_norm_eps", "tie_word_embeddings"),
        *("attention_bias", "mlp_bias", "sliding_window"),
    ],
)
def test_null_is_read_where_transformers_reads_it(family: str, key: str):
    """`head_dim` is no key of a Qwen2 config, nor are the biases of all: there transformers does not look at them."""
    config = small(family, **{key: None})
    if key not in AutoConfig.for_model(family).to_dict():
        return
    try:
        theirs = AutoConfig.for_model(**copy.deepcopy(config))
    except StrictDataclassError:
        with pytest.raises(InputError) as caught:
            read(config)
        assert f"The config of the model has {key} = null, which transformers does not accept of a {family}" in str(
            caught.value
        )
        return
    ours = read(config)
    assert ours.num_kv_heads == theirs.num_key_value_heads
    assert ours.head_dim == (getattr(theirs, "head_dim", None) or theirs.hidden_size // theirs.num_attention_heads)


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
def test_heads_that_do_not_divide_the_hidden_size_are_read_where_transformers_reads_them(family: str):
    config = small(family, num_attention_heads=3, num_key_value_heads=1, head_dim=16)
    try:
        AutoConfig.for_model(**copy.deepcopy(config))
    except StrictDataclassError:
        with pytest.raises(UnsupportedError) as caught:
            read(config)
        assert str(caught.value) == (
            "A llama with hidden_size = 64, which is no multiple of num_attention_heads = 3, is not accepted by "
            "transformers.\n"
            "  where: config.json\n"
            '  next:  In a copy of its folder, write "model_type": "mistral", "architectures": ["MistralForCausalLM"] '
            'and "sliding_window": null into config.json: without biases that is the same model, and is accepted.'
        )
    else:
        assert read(config).num_heads == 3


# --- RoPE -------------------------------------------------------------------------------------------------------------

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 128,
}


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}


@pytest.mark.parametrize(
    ("keys", "theta", "scaling"),
    [
        ({}, 10000.0, None),
        ({"rope_theta": 5e5}, 5e5, None),
        ({"rope_theta": 5e5, "rope_scaling": None}, 5e5, None),
        ({"rope_parameters": {"rope_theta": 1e5, "rope_type": "default"}}, 1e5, None),
        # Both spellings, as we write them ourselves: old readers look at the first, transformers 5 at the second.
        ({"rope_theta": 1e5, "rope_parameters": {"rope_theta": 1e5, "rope_type": "default"}}, 1e5, None),
        ({"rope_theta": 1e4, "rope_parameters": {"rope_theta": 1e5, "rope_type": "default"}}, 1e5, None),
        ({"rope_theta": 5e5, "rope_scaling": LLAMA3}, 5e5, LLAMA3),
        ({"rope_parameters": LLAMA3 | {"rope_theta": 5e5}}, 5e5, LLAMA3),
        # What it stretches from, where a config does not say.
        (
            {"rope_scaling": {"type": "yarn", "factor": 4.0}, "max_position_embeddings": 512},
            1e4,
            {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512},
        ),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, 1e4, {"rope_type": "linear", "factor": 2.0}),
        ({"rope_scaling": YARN}, 1e4, YARN),
    ],
)
def test_both_spellings_of_rope(keys: dict[str, Any], theta: float, scaling: dict[str, Any] | None):
    architecture = read(small(**keys))
    assert (architecture.rope_theta, architecture.rope_scaling) == (theta, scaling)
    # transformers writes into the tables that it is given
    given = copy.deepcopy({key: value for key, value in keys.items() if value})
    theirs = dict(AutoConfig.for_model(**small(**given)).rope_parameters)
    assert theirs.pop("rope_theta") == theta
    theirs.pop("type", None)
    assert theirs == (scaling or {"rope_type": "default"})


@pytest.mark.parametrize(
    "nulls", [("attention_factor",), ("beta_fast", "beta_slow"), ("mscale", "mscale_all_dim"), ("factor",)]
)
def test_nulls_in_yarn_compute_what_transformers_computes(nulls: tuple[str, ...]):
    scaling = YARN | dict.fromkeys(nulls)
    config = small(rope_scaling=scaling, max_position_embeddings=1024)
    theirs = AutoConfig.for_model(**copy.deepcopy(config))
    frequencies, factor = ROPE_INIT_FUNCTIONS["yarn"](theirs)
    architecture = read(config)
    assert architecture.rope_scaling is not None and None not in architecture.rope_scaling.values()
    (kind,) = architecture.layer_kinds
    assert kind.rope is not None
    table = rope_table(kind.rope, architecture.max_positions)
    angles = torch.arange(len(table.cos))[:, None] * frequencies
    assert torch.equal(torch.from_numpy(table.cos), angles.cos() * factor)
    assert torch.equal(torch.from_numpy(table.sin), angles.sin() * factor)


@pytest.mark.parametrize(
    ("scaling", "written", "meant"),
    [
        (YARN, 128, 512),  # switched on by hand, as model cards say
        (YARN, 512, 512),
        (YARN, 1024, 1024),
        (YARN | {"factor": 2.5}, 128, 320),
        ({"type": "yarn", "factor": 4.0}, 128, 128),  # either length may be meant
        (LLAMA3, 128, 128),
        (None, 128, 128),
    ],
)
def test_yarn_reaches_as_far_as_it_stretches(scaling: dict[str, Any] | None, written: int, meant: int):
    architecture = read(small(rope_scaling=scaling, max_position_embeddings=written))
    assert architecture.max_positions == meant
    (kind,) = architecture.layer_kinds
    assert kind.rope is not None
    assert len(rope_table(kind.rope, architecture.max_positions).cos) == meant


@pytest.mark.parametrize(
    ("scaling", "text"),
    [
        ("linear", "rope_scaling is 'linear', not a table."),
        ([1.0], "rope_scaling is [1.0], not a table."),
        ({"type": "linear"}, "rope_scaling.factor is null or missing, and RoPE of type linear needs it."),
        ({"type": "linear", "factor": "2"}, "factor is '2'"),
        ({"type": "dynamic", "factor": None}, "rope_scaling.factor is null or missing"),
        ({"type": "yarn"}, "rope_scaling.factor is null or missing"),
        (YARN | {"original_max_position_embeddings": None}, "rope_scaling.original_max_position_embeddings is null"),
        (YARN | {"factor": -1}, "factor is -1"),
        (YARN | {"factor": float("inf")}, "factor is inf"),
        (YARN | {"rope_theta": "x"}, "rope_theta is 'x'"),
        (LLAMA3 | {"high_freq_factor": None}, "rope_scaling.high_freq_factor is null"),
    ],
)
def test_rope_parameters_that_are_none_are_named(scaling: Any, text: str):
    with pytest.raises(InputError) as caught:
        read(small(rope_scaling=scaling))
    assert caught.value.exit_code == 3
    assert text in caught.value.what


# --- windows ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "window"),
    [
        (small("mistral"), 4096),
        (small("mistral", sliding_window=None), None),
        (small("qwen2", sliding_window=64), None),
        (small("qwen2", sliding_window=64, use_sliding_window=True, max_window_layers=0), 64),
        (small("qwen2", sliding_window=64, use_sliding_window=True, max_window_layers=2), None),
        (small("qwen3", use_sliding_window=True, layer_types=["full_attention"] * 2), None),
        (small("qwen3", use_sliding_window=True, layer_types=["sliding_attention"] * 2), 4096),
    ],
)
def test_one_window_for_all_layers_or_none(config: dict[str, Any], window: int | None):
    assert read(config).sliding_window == window


def test_there_are_families():
    assert {"gemma3_text", "llama", "mistral", "qwen3"} <= set(supported_families())


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "text"),
    [
        (
            small("mixtral"),
            "Models of type 'mixtral' are not supported. Did you mean 'mistral'?\n"
            "  where: config.json\n"
            f"  next:  Use a model of one of these types: {', '.join(supported_families())}.",
        ),
        (
            small("qwen2_moe", num_experts=128),
            "A qwen2_moe is a mixture of 128 experts of a kind that is not supported.\n"
            "  where: config.json\n"
            f"  next:  Use a model of one of these types: {', '.join(supported_families())}.",
        ),
        (
            small(hidden_act="gelu"),
            "A llama with hidden_act = 'gelu' is not supported.\n"
            "  where: config.json\n"
            "  next:  Use a model with hidden_act = 'silu'.",
        ),
        (
            small(quantization_config={"quant_method": "gptq"}),
            "This checkpoint is quantized (gptq); its weights cannot be cut as they are.\n"
            "  where: config.json\n"
            "  next:  Give the checkpoint that it was quantized from, in fp32, fp16 or bf16.",
        ),
        (
            small(rope_parameters={"full_attention": {"rope_theta": 1.0}, "sliding_attention": {"rope_theta": 2.0}}),
            "RoPE that differs between layers is not supported: full_attention, sliding_attention.\n"
            "  where: config.json\n"
            "  next:  Use a model with one RoPE for all layers.",
        ),
        (
            small(rope_scaling={"rope_type": "spiral"}),
            "RoPE of type 'spiral' is not supported.\n"
            "  where: config.json\n"
            "  next:  Use a model whose RoPE is one of: default, linear, dynamic, yarn, longrope, llama3.",
        ),
    ],
)
def test_what_we_do_not_compute_is_refused(config: dict[str, Any], text: str):
    with pytest.raises(UnsupportedError) as caught:
        read(config)
    assert str(caught.value) == text
    assert caught.value.exit_code == 7


@pytest.mark.parametrize("key", ["rope_parameters", "top-level"])
def test_rope_over_a_part_of_each_head_is_refused(key: str):
    keys = {"partial_rotary_factor": 0.5}
    with pytest.raises(UnsupportedError, match=r"part of each head|partial_rotary_factor = 0.5"):
        read(small(**(keys if key == "top-level" else {key: {"rope_theta": 1e4, **keys}})))


def test_a_config_that_lacks_a_dimension_is_named():
    config = small()
    del config["hidden_size"]
    with pytest.raises(InputError) as caught:
        read(config)
    assert str(caught.value) == (
        "The config of the model does not say 'hidden_size'.\n"
        "  where: config.json\n"
        "  next:  Get config.json again from where the weights come from."
    )


def test_all_senseless_dimensions_are_named_at_once():
    with pytest.raises(InputError) as caught:
        read(small(hidden_size="64", intermediate_size=0, head_dim=16, rms_norm_eps="1e-6"))
    assert caught.value.what == (
        "The config of the model is wrong: hidden_size is '64'; ffn_size is 0; norm_eps is '1e-6'."
    )
    with pytest.raises(InputError, match="4 heads cannot share 3 KV heads evenly"):
        read(small(num_key_value_heads=3))


def test_a_config_without_a_model_type_is_refused():
    with pytest.raises(UnsupportedModel, match="Models of type 'None' are not supported"):
        read({})


@pytest.mark.parametrize(
    ("toml", "problem"),
    [
        ("[confg]", "a table named 'confg', which means nothing. Did you mean 'config'?"),
        ("[config]\nnum_layer = 'n'", "in [config] a dimension named 'num_layer', which means nothing. Did you mean"),
        ("[weights]\n'w' = { axis = ['hidden'] }", "for the weight w a key named 'axis', which means nothing."),
        ("[weights]\n'w' = { axes = ['hiden'] }", "for the weight w an axis named 'hiden', which means nothing. Did"),
        ("[weights]\n'w' = { axes = [], when = 'qk_nrm' }", "for the weight w a condition named 'qk_nrm', which"),
    ],
)
def test_an_unknown_key_in_a_family_file_is_an_error(tmp_path: Path, toml: str, problem: str):
    (tmp_path / "mine.toml").write_text(f"model_type = 'mine'\n{toml}\n")
    with pytest.raises(InputError) as caught:
        read_family("mine", tmp_path)
    assert problem in caught.value.what
    assert caught.value.where == str(tmp_path / "mine.toml")
