"""The `config.json` of a cut model. Which transformers model it is: `model_type.py`."""

from __future__ import annotations

from typing import Any

from amoeba_export.formats.model_type import AMOEBA, container_type, switches
from amoeba_export.ir import Architecture, DenseArchitecture, LayerKind, Rope, Subnet, SubnetPlan
from amoeba_export.ir.features import features_of
from amoeba_export.load.family_file import FamilyFile, read_family
from amoeba_export.load.kinds import TYPES_KEY
from amoeba_export.model.foreign_code import AUTO_MAP

_AMOEBA_CLASS = "AmoebaForCausalLM"

_NUMBERS = ("embedding_scale", "residual_scale", "logits_divisor", "attention_scale")
"""Facts that a stock type has keys for and other families do not vary."""

_CARRIED = (
    *("bos_token_id", "eos_token_id", "pad_token_id", "initializer_range", "attention_dropout", "hidden_act"),
    "original_max_position_embeddings",
)
_NOT_CARRIED = (
    *("_name_or_path", "transformers_version", "torch_dtype", "auto_map", "rope_scaling", "pretraining_tp"),
    *("attn_implementation", "_attn_implementation"),  # may name code, and says how to compute, not what
)


def dense_config(subnet: Subnet, *, dtype: str) -> dict[str, Any]:
    """The `config.json` of a cut model.

    RoPE is written in the spelling of transformers 4 (`rope_theta`, `rope_scaling`) and of 5 (`rope_parameters`): each
    reader ignores the other one, and 4.57 silently falls back to a base of 10000 when it finds only the new one.

    Args:
        subnet: What is written.
        dtype: torch's name of the dtype of the weights, such as `bfloat16`.
    """
    dense = subnet.architecture
    return _named(dense, container_type(dense), subnet.plan, dtype)


def graph_config(subnet: Subnet, *, dtype: str) -> dict[str, Any]:
    """The `config.json` beside an ONNX graph, which computes by itself: only the shape of the KV cache is read from it.

    The type is the source's, whatever the layers are: code beside a graph would be asked for and not needed. optimum
    (0.1.0 of optimum-onnx) takes the head dim for hidden size / heads, which is wrong where heads were cut and for most
    Qwen3; `hidden_size` is therefore heads * head dim here. Layers with different KV heads are beyond optimum.

    Args:
        subnet: What is written.
        dtype: torch's name of the dtype that goes in and out of the graph.
    """
    dense = subnet.architecture
    config = _named(dense, dense.base.family, subnet.plan, dtype)
    largest = _per_layer(dense)
    config |= {key: largest[key] for key in ("num_attention_heads", "num_key_value_heads", "intermediate_size")}
    config["hidden_size"] = config["num_attention_heads"] * dense.base.head_dim
    return config


def _named(dense: DenseArchitecture, model_type: str, plan: SubnetPlan, dtype: str) -> dict[str, Any]:
    if model_type == dense.base.family and dense.has_whole_layers:
        config = _cut_in_depth(dense, plan)
    else:
        config = _built(dense, model_type, plan)
    return {
        "architectures": [_AMOEBA_CLASS if model_type == AMOEBA else read_family(model_type).class_name],
        "model_type": model_type,
        **config,
        **_rope(dense, model_type),
        "dtype": dtype,
        "torch_dtype": dtype,
        "use_cache": True,
    }


def _cut_in_depth(dense: DenseArchitecture, plan: SubnetPlan) -> dict[str, Any]:
    """The source's config with fewer layers."""
    config = {key: value for key, value in dense.base.config.items() if key not in _NOT_CARRIED}
    config["num_hidden_layers"] = len(dense.layers)
    config["head_dim"] = dense.base.head_dim
    return config | _lists(dense.base, plan)


def _lists(base: Architecture, plan: SubnetPlan) -> dict[str, Any]:
    """What the source's config lists per layer, for the layers that are kept."""
    keys = (TYPES_KEY, read_family(base.family).rope.get("skipped", {}).get("key"))
    return {key: [base.config[key][i] for i in plan.kept_layers] for key in keys if key and base.config.get(key)}


def _built(dense: DenseArchitecture, model_type: str, plan: SubnetPlan) -> dict[str, Any]:
    """A config from the dims, for a type that may not be the source's."""
    base, first = dense.base, dense.layers[0]
    config: dict[str, Any] = {
        "vocab_size": base.vocab_size,
        "hidden_size": base.hidden_size,
        "num_hidden_layers": len(dense.layers),
        "num_attention_heads": first.num_heads,
        "num_key_value_heads": first.num_kv_heads,
        "head_dim": base.head_dim,
        "intermediate_size": first.ffn_size,
        "max_position_embeddings": base.max_positions,
        "rms_norm_eps": base.norm_eps,
        "tie_word_embeddings": base.tied_embeddings,
        "hidden_act": "silu",
    }
    config |= {key: base.config[key] for key in _CARRIED if key in base.config}
    if model_type == AMOEBA:
        return config | _per_layer(dense)
    file = read_family(model_type)
    biases = {str(file.key(flag)): value for flag, value in switches(file, first).items()}
    if model_type == base.family and (features_of(base) or file.family.fused):
        keys = ("num_heads", "num_kv_heads", "ffn_size")
        dims = {str(file.key(name)): getattr(first, name) for name in keys}
        if base.expert_size:
            dims[str(file.key("experts_per_token"))] = base.picked_of(first.ffn_size)
        return _cut_in_depth(dense, plan) | dims | biases
    return config | biases | _facts(base, file)


def _facts(base: Architecture, file: FamilyFile) -> dict[str, Any]:
    """Numbers and window of a stock type, as `base` has them."""
    facts: dict[str, Any] = {
        str(file.key(name)): base.score_scale if name == "attention_scale" else getattr(base, name)
        for name in file.config
        if name in _NUMBERS
    }
    if (key := file.key("sliding_window")) is not None:
        if "enabled" in file.window:
            facts[file.window["enabled"]] = base.sliding_window is not None
        facts[key] = base.sliding_window
        if "first_layer" in file.window:
            facts[file.window["first_layer"]["key"]] = 0
    return facts


def _per_layer(dense: DenseArchitecture) -> dict[str, Any]:
    """What `modeling_amoeba.py` reads. The stock keys name the largest layer, for tools that size buffers by them."""
    base, layers = dense.base, dense.layers
    config: dict[str, Any] = {
        "auto_map": dict(AUTO_MAP),
        "num_attention_heads": max(max(dims.num_heads for dims in layers), 1),
        "num_key_value_heads": max(max(dims.num_kv_heads for dims in layers), 1),
        "intermediate_size": max(max(dims.ffn_size for dims in layers) * base.unit_size, 1),
        "layer_query_heads": [dims.num_heads for dims in layers],
        "layer_kv_heads": [dims.num_kv_heads for dims in layers],
        "layer_ffn_sizes": [dims.ffn_size * base.unit_size for dims in layers],
        "layer_o_bias": [dims.o_bias for dims in layers],
        "layer_down_bias": [dims.down_bias for dims in layers],
        "qkv_bias": base.qkv_bias,
        "gate_up_bias": base.mlp_bias,
        "qk_norm": base.qk_norm,
        "sliding_window": base.sliding_window,
        # By place in the cache, as transformers makes one from it: layers without attention come last.
        "layer_types": [dense.kind(dims).name for dims in sorted(layers, key=lambda dims: not dims.num_heads)],
    }
    facts = {key: value for key, value in base.facts().items() if key in _AMOEBA_FACTS}
    if "attention_scale" in facts:
        facts["attention_scale"] = base.score_scale
    if {"layer_kinds", "no_rope"} & features_of(base):
        config["sliding_window"] = next((kind.window for kind in base.layer_kinds if kind.window), None)
        facts["layer_kinds"] = [_amoeba_kind(base, kind) for kind in base.layer_kinds]
        facts["layer_kind"] = [dims.kind for dims in layers]
    return config | facts


_AMOEBA_FACTS = (
    *("qk_norm_scope", "rotary_dims", "norm_offset", "input_norms", "output_norms", "activation", "attention_scale"),
    *("attention_softcap", "query_temperature", "embedding_scale", "residual_scale", "logits_divisor", "final_softcap"),
    *("expert_size", "experts_per_token", "shares_sum_to_one"),
)


def _amoeba_kind(base: Architecture, kind: LayerKind) -> dict[str, Any]:
    """A kind of layer in the words of `AmoebaConfig`."""
    if kind.rope is None:
        return {"window": kind.window, "rope": None}
    parameters = {**(kind.rope.scaling or {"rope_type": "default"}), "rope_theta": kind.rope.theta}
    return {"window": kind.window, "rope": parameters, "rotary_dims": kind.rope.dims}


def _rope(dense: DenseArchitecture, model_type: str) -> dict[str, Any]:
    base = dense.base
    if model_type == base.family and len(_by_type(base)) > 1:
        return _nested_rope(base)
    scaling = dict(base.rope_scaling or {"rope_type": "default"})
    rope: dict[str, Any] = {
        "rope_theta": base.rope_theta,
        "rope_parameters": {**scaling, "rope_theta": base.rope_theta},
    }
    if base.rope_scaling:
        rope["rope_scaling"] = scaling
    if base.rotary_dims is not None and model_type == base.family:
        share = base.rotary_dims / base.head_dim
        rope["partial_rotary_factor"] = rope["rope_parameters"]["partial_rotary_factor"] = share
    return rope


def _by_type(base: Architecture) -> dict[str, Rope]:
    """RoPE per layer type, where types differ in it; else one or none."""
    ropes = {kind.name: kind.rope for kind in base.layer_kinds if kind.rope is not None}
    return ropes if read_family(base.family).rope.get("by_layer_type") else {}


def _nested_rope(base: Architecture) -> dict[str, Any]:
    """RoPE per layer type: nested for transformers 5, and the keys of 4 that `by_layer_type` names."""
    rules = read_family(base.family).rope["by_layer_type"]
    written: dict[str, Any] = {"rope_parameters": {}}
    for name, rope in _by_type(base).items():
        scaling = dict(rope.scaling or {"rope_type": "default"})
        written["rope_parameters"][name] = {**scaling, "rope_theta": rope.theta}
        if "key" in rules[name]:
            written[rules[name]["key"]] = rope.theta
        if rope.scaling and rules[name].get("scaled"):
            written["rope_scaling"] = scaling
    return written
