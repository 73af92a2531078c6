"""The keys of a GGUF file that say what llama.cpp computes with its tensors."""

from __future__ import annotations

from collections.abc import Sequence

import gguf

from amoeba_export.formats.gguf.rope import (
    global_rope,
    local_rope,
    longrope_magnitude,
    rope_type,
    window_pattern,
    yarn_magnitude,
)
from amoeba_export.ir import Architecture, DenseArchitecture, LayerDims
from amoeba_export.llama_cpp.architectures import LlamaCppArchitecture


def add_hyperparameters(
    header: gguf.GGUFWriter,
    dense: DenseArchitecture,
    architecture: LlamaCppArchitecture,
    layers: Sequence[LayerDims],
    *,
    name: str,
    file_type: gguf.LlamaFileType,
) -> None:
    """Add every key but those of the tokenizer. `layers` are the dims that the file says."""
    base = dense.base
    header.add_type(gguf.GGUFType.MODEL)
    header.add_name(name)
    header.add_file_type(file_type)
    header.add_quantization_version(gguf.GGML_QUANT_VERSION)
    header.add_vocab_size(base.vocab_size)
    header.add_context_length(base.max_positions)
    header.add_embedding_length(base.hidden_size)
    header.add_block_count(len(layers))
    # One number where all layers agree: older readers of `llama` know no arrays.
    if base.expert_size:
        picked = base.picked_of(layers[0].ffn_size)
        header.add_expert_count(layers[0].ffn_size)
        header.add_expert_used_count(picked)
        header.add_expert_feed_forward_length(base.expert_size)
        header.add_feed_forward_length(picked * base.expert_size)  # what older readers divide
    else:
        header.add_feed_forward_length(_one_or_all([dims.ffn_size for dims in layers]))
    header.add_head_count(_one_or_all([dims.num_heads for dims in layers]))
    header.add_head_count_kv(_one_or_all([dims.num_kv_heads for dims in layers]))
    header.add_key_length(base.head_dim)
    header.add_value_length(base.head_dim)
    header.add_layer_norm_rms_eps(base.norm_eps)
    _add_rope(header, dense)
    _add_scales(header, base, architecture)
    _add_windows(header, dense, architecture)


def _add_rope(header: gguf.GGUFWriter, dense: DenseArchitecture) -> None:
    rope = global_rope(dense)
    if rope is None:
        return
    header.add_rope_dimension_count(rope.dims)
    header.add_rope_freq_base(rope.theta)
    scaling, kind = rope.scaling or {}, rope_type(rope)
    original = scaling.get("original_max_position_embeddings", dense.base.max_positions)
    magnitude = 1.0
    if kind == "linear":
        header.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        header.add_rope_scaling_factor(scaling["factor"])
    if kind == "yarn":
        header.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        header.add_rope_scaling_factor(scaling["factor"])
        header.add_rope_scaling_orig_ctx_len(original)
        magnitude = yarn_magnitude(scaling)
    if kind == "longrope":
        header.add_rope_scaling_type(gguf.RopeScalingType.LONGROPE)
        header.add_rope_scaling_orig_ctx_len(original)
        magnitude = longrope_magnitude(rope, dense.base.max_positions)
    if magnitude != 1.0:
        header.add_float32(gguf.Keys.Rope.SCALING_ATTN_FACTOR.format(arch=header.arch), magnitude)


def _add_scales(header: gguf.GGUFWriter, base: Architecture, architecture: LlamaCppArchitecture) -> None:
    """Factors and caps, where they are not what llama.cpp takes for granted."""
    if "logits_divisor" in architecture.computes:
        header.add_attention_scale(base.score_scale)
        header.add_embedding_scale(base.embedding_scale)
        header.add_residual_scale(base.residual_scale)
        header.add_logit_scale(base.logits_divisor)  # by which llama.cpp divides
    if base.query_temperature is not None:
        header.add_float32(gguf.Keys.Attention.TEMPERATURE_SCALE.format(arch=header.arch), base.query_temperature.beta)
    if base.attention_softcap is not None:
        header.add_attn_logit_softcapping(base.attention_softcap)
    if base.final_softcap is not None:
        header.add_final_logit_softcapping(base.final_softcap)


def _add_windows(header: gguf.GGUFWriter, dense: DenseArchitecture, architecture: LlamaCppArchitecture) -> None:
    if architecture.kinds != "listed":
        return
    window, pattern = window_pattern(architecture, dense)
    if window is None:
        return
    header.add_sliding_window(window)
    if pattern is not None:
        key = gguf.Keys.Attention.SLIDING_WINDOW_PATTERN.format(arch=header.arch)
        if isinstance(pattern, list):
            header.add_array(key, pattern)
        else:
            header.add_uint32(key, pattern)
    rope = local_rope(dense)
    if rope is not None and not architecture.one_base:
        header.add_float32(gguf.Keys.Rope.FREQ_BASE_SWA.format(arch=header.arch), rope.theta)


def _one_or_all(values: list[int]) -> int | list[int]:
    return values[0] if len(set(values)) == 1 else values
