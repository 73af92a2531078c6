"""Which transformers model a cut model is, and its `config.json`.

A stock type is chosen wherever one computes the same function, so that the folder loads everywhere without code of
ours. The rest is `amoeba` (`modeling_amoeba.py`, beside the weights).
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any

from amoeba_export.errors import NotRepresentable, UnsupportedModel
from amoeba_export.ir import DenseArchitecture, LayerDims, Subnet, SubnetPlan, TensorSpec
from amoeba_export.ir.family import FEATURE_WORDS, FEATURES, Feature
from amoeba_export.model.foreign_code import AUTO_MAP

AMOEBA = "amoeba"

_CLASSES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "granite": "GraniteForCausalLM",
    AMOEBA: "AmoebaForCausalLM",
}
FAMILIES = tuple(name for name in _CLASSES if name != AMOEBA)
"""The families whose function the formats here know how to write."""

_CARRIED = ("bos_token_id", "eos_token_id", "pad_token_id", "initializer_range", "attention_dropout", "hidden_act")
_NOT_CARRIED = (
    *("_name_or_path", "transformers_version", "torch_dtype", "auto_map", "rope_scaling", "pretraining_tp"),
    *("attn_implementation", "_attn_implementation"),  # may name code, and says how to compute, not what
)


def check_family(dense: DenseArchitecture) -> None:
    """Raise `UnsupportedModel` for a family that no format here writes: it would become another one's function."""
    if dense.base.family not in FAMILIES:
        raise UnsupportedModel(dense.base.family, FAMILIES)


def check_features(container: str, dense: DenseArchitecture, computes: Collection[Feature]) -> None:
    """Refuse a model with something that `container` does not compute.

    Raises:
        NotRepresentable: Naming what it is.
    """
    if missing := [FEATURE_WORDS[feature] for feature in FEATURES if feature in dense.base.features - set(computes)]:
        reason = f"a {dense.base.family} with {', '.join(missing)} is not written as {container} yet"
        raise NotRepresentable(container, reason, ("--format safetensors",))


def container_type(dense: DenseArchitecture) -> str:
    """The `model_type` that holds `dense`.

    - Whole layers of the source: the source's own type.
    - Layers that differ, or a block that is gone: `amoeba`.
    - QK norms (Qwen3): `qwen3` unless a down_proj bias is needed, which no stock type with QK norms has.
    - A sliding window: `mistral` or `qwen2`, unless a bias is needed that they do not have.
    - No biases: the source's type; `mistral` where Llama's config refuses the number of heads.
    - Biases: `llama`, or `granite` with neutral multipliers where Llama's config refuses the number of heads.

    Raises:
        UnsupportedModel: As `check_family`.
    """
    check_family(dense)
    base = dense.base
    if dense.has_whole_layers:
        return base.family
    dims = dense.layers[0]
    if not dense.is_uniform or not dims.num_heads or not dims.ffn_size:
        return AMOEBA
    output_bias = dims.o_bias or dims.down_bias or dims.gate_up_bias
    if base.qk_norm:
        return AMOEBA if dims.down_bias or dims.gate_up_bias else base.family
    if base.sliding_window is not None:
        if output_bias:
            return AMOEBA
        return "qwen2" if dims.qkv_bias else "mistral"
    if not output_bias and dims.qkv_bias:
        return "qwen2"
    llama_accepts = base.hidden_size % dims.num_heads == 0
    if not output_bias:
        return base.family if base.family != "llama" or llama_accepts else "mistral"
    return "llama" if llama_accepts else "granite"


def zero_biases(dense: DenseArchitecture) -> Iterator[TensorSpec]:
    """Biases that the container's type has and the model does not: stock types have them all or none."""
    model_type = container_type(dense)
    if model_type not in ("llama", "granite", "qwen3"):
        return
    for idx, dims in enumerate(dense.layers):
        attention, mlp = _has_biases(dims)
        base = dense.base
        wanted = {
            "self_attn.q_proj": (attention and not dims.qkv_bias, dims.num_heads * base.head_dim),
            "self_attn.k_proj": (attention and not dims.qkv_bias, dims.num_kv_heads * base.head_dim),
            "self_attn.v_proj": (attention and not dims.qkv_bias, dims.num_kv_heads * base.head_dim),
            "self_attn.o_proj": (attention and not dims.o_bias, base.hidden_size),
            "mlp.gate_proj": (mlp and not dims.gate_up_bias, dims.ffn_size),
            "mlp.up_proj": (mlp and not dims.gate_up_bias, dims.ffn_size),
            "mlp.down_proj": (mlp and not dims.down_bias, base.hidden_size),
        }
        for module, (missing, size) in wanted.items():
            if missing:
                yield TensorSpec(name=f"model.layers.{idx}.{module}.bias", shape=(size,))


def _has_biases(dims: LayerDims) -> tuple[bool, bool]:
    """Whether a stock type's one switch for attention biases, and the one for FFN biases, must be on."""
    return dims.qkv_bias or dims.o_bias, dims.gate_up_bias or dims.down_bias


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
        config = _built(dense, model_type)
    return {
        "architectures": [_CLASSES[model_type]],
        "model_type": model_type,
        **config,
        **_rope(dense),
        "dtype": dtype,
        "torch_dtype": dtype,
        "use_cache": True,
    }


def _cut_in_depth(dense: DenseArchitecture, plan: SubnetPlan) -> dict[str, Any]:
    """The source's config with fewer layers."""
    config = {key: value for key, value in dense.base.config.items() if key not in _NOT_CARRIED}
    config["num_hidden_layers"] = len(dense.layers)
    config["head_dim"] = dense.base.head_dim
    if layer_types := config.get("layer_types"):
        config["layer_types"] = [layer_types[i] for i in plan.kept_layers]
    return config


def _built(dense: DenseArchitecture, model_type: str) -> dict[str, Any]:
    """A config from the dims, for a type that may not be the source's."""
    base, first = dense.base, dense.layers[0]
    attention_bias, mlp_bias = _has_biases(first)
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
    if model_type in ("llama", "granite", "qwen3"):
        config["attention_bias"] = attention_bias
    if model_type in ("llama", "granite"):
        config["mlp_bias"] = mlp_bias
    if model_type == "granite":
        config |= {"embedding_multiplier": 1.0, "residual_multiplier": 1.0, "logits_scaling": 1.0}
        config["attention_multiplier"] = base.head_dim**-0.5
    if model_type == "mistral":
        config["sliding_window"] = base.sliding_window
    if model_type in ("qwen2", "qwen3"):
        config["use_sliding_window"] = base.sliding_window is not None
        config["sliding_window"] = base.sliding_window
        config["max_window_layers"] = 0
    if model_type == AMOEBA:
        config |= _per_layer(dense)
    return config


def _per_layer(dense: DenseArchitecture) -> dict[str, Any]:
    """What `modeling_amoeba.py` reads. The stock keys name the largest layer, for tools that size buffers by them."""
    base, layers = dense.base, dense.layers
    return {
        "auto_map": dict(AUTO_MAP),
        "num_attention_heads": max(max(dims.num_heads for dims in layers), 1),
        "num_key_value_heads": max(max(dims.num_kv_heads for dims in layers), 1),
        "intermediate_size": max(max(dims.ffn_size for dims in layers), 1),
        "layer_query_heads": [dims.num_heads for dims in layers],
        "layer_kv_heads": [dims.num_kv_heads for dims in layers],
        "layer_ffn_sizes": [dims.ffn_size for dims in layers],
        "layer_o_bias": [dims.o_bias for dims in layers],
        "layer_down_bias": [dims.down_bias for dims in layers],
        "qkv_bias": base.qkv_bias,
        "gate_up_bias": base.mlp_bias,
        "qk_norm": base.qk_norm,
        "sliding_window": base.sliding_window,
        "layer_types": ["full_attention" if base.sliding_window is None else "sliding_attention"] * len(layers),
    }


def _rope(dense: DenseArchitecture) -> dict[str, Any]:
    scaling = dict(dense.base.rope_scaling or {"rope_type": "default"})
    rope: dict[str, Any] = {
        "rope_theta": dense.base.rope_theta,
        "rope_parameters": {**scaling, "rope_theta": dense.base.rope_theta},
    }
    if dense.base.rope_scaling:
        rope["rope_scaling"] = scaling
    return rope
