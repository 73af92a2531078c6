"""What the metadata of a GGUF file says of the function, as a config of transformers.

Every key is read, or known to change nothing, or refused by name: see `keys.py`.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from amoeba_export.errors import DamagedFile, MixtureOfExperts, UnsupportedError, UnsupportedModel
from amoeba_export.gguf_file import GgufFile
from amoeba_export.llama_cpp.architectures import ARCHITECTURES, LlamaCppArchitecture, has_window, rotates, score_scale
from amoeba_export.load.family_file import read_family, supported_families
from amoeba_export.load.gguf.keys import NEXT_STEP, Keys, decimal

_YARN = {"ext_factor": (-1.0, 1.0), "attn_factor": (-1.0, 1.0), "beta_fast": (32.0,), "beta_slow": (1.0,)}
"""`rope.scaling.yarn_*`, which converters write and llama.cpp does not read in these architectures -> what it computes
with instead. Another value means that the file and its model differ."""


@functools.cache
def families_by_architecture() -> Mapping[str, str]:
    """Architecture of llama.cpp -> our family, as the families' files say."""
    return {
        architecture: name
        for name in supported_families()
        for architecture in read_family(name).containers.get("gguf", {}).get("architectures", ())
    }


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerSize:
    """The dims of one layer as the file has them."""

    num_heads: int
    num_kv_heads: int
    ffn_size: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Metadata:
    """What the keys say; nothing of it comes from tensors.

    Attributes:
        arch: llama.cpp's architecture.
        rope: As `rope_parameters` of transformers, of layers without a window; tensors may still add to it.
        rope_dims: Leading dims of a head that it turns.
        local_theta: Its base in layers with a window.
        rotated: Per layer, whether it turns at all.
        window: Tokens of it, or None where no layer has one.
        local: Per layer, whether it has the window.
        temperature: How queries grow with their position, or None.
        facts: What else the file says, by field of `Architecture`.
    """

    arch: LlamaCppArchitecture
    layers: tuple[LayerSize, ...]
    hidden_size: int
    head_dim: int
    max_positions: int
    norm_eps: float
    rope: Mapping[str, Any]
    rope_dims: int
    local_theta: float
    rotated: tuple[bool, ...]
    window: int | None
    local: tuple[bool, ...]
    temperature: float | None
    facts: Mapping[str, float | None]


def read_metadata(file: GgufFile) -> Metadata:
    """Read every key that changes the function.

    Raises:
        UnsupportedModel: Another architecture.
        UnsupportedError: A key that we do not compute, named.
        DamagedFile: A key is missing, or has a value that is none.
    """
    arch = _architecture_of(file)
    keys = Keys(file, arch)
    num_layers = keys.count("block_count")
    num_heads = keys.per_layer("attention.head_count", num_layers)
    num_kv_heads = keys.per_layer("attention.head_count_kv", num_layers, num_heads)
    ffn_sizes, experts = _ffn(keys, num_layers)
    hidden_size = keys.count("embedding_length")
    head_dim = keys.count("attention.key_length", hidden_size // max(num_heads[0], 1))
    value_dim = keys.count("attention.value_length", hidden_size // max(num_heads[0], 1))
    if value_dim != head_dim:
        raise keys.refused("attention.value_length", value_dim, f"keys are {head_dim} long")
    rope_dims = keys.count("rope.dimension_count", head_dim)
    if rope_dims > head_dim or rope_dims % 2 or (rope_dims != head_dim and "partial_rotary" not in arch.computes):
        raise keys.refused("rope.dimension_count", rope_dims, f"heads are {head_dim} long")
    max_positions = keys.count("context_length")
    window, local = _windows(keys, num_layers, max_positions)
    rope = _rope(keys, max_positions)
    scale = score_scale(arch, num_layers, hidden_size, max(num_heads[0], 1), head_dim)
    metadata = Metadata(
        arch=arch,
        layers=tuple(
            LayerSize(num_heads=heads, num_kv_heads=kv_heads, ffn_size=ffn_size)
            for heads, kv_heads, ffn_size in zip(num_heads, num_kv_heads, ffn_sizes, strict=True)
        ),
        hidden_size=hidden_size,
        head_dim=head_dim,
        max_positions=max_positions,
        norm_eps=decimal(keys.number("attention.layer_norm_rms_epsilon")),
        rope=rope,
        rope_dims=rope_dims,
        local_theta=_local_theta(keys, rope["rope_theta"]),
        rotated=tuple(rotates(arch, layer) for layer in range(num_layers)),
        window=window,
        local=local,
        temperature=_temperature(keys, rope),
        facts=experts | _facts(keys, scale, head_dim),
    )
    if arch.hybrid == num_layers:
        raise keys.refused("block_count", num_layers, "llama.cpp takes windows and layers without RoPE for granted")
    keys.finish()
    _check_layers(metadata, file.path)
    return metadata


def _architecture_of(file: GgufFile) -> LlamaCppArchitecture:
    kind = file.fields.get("general.type", "model")
    if kind != "model":
        raise UnsupportedError(
            f"This GGUF file holds no model: its general.type is '{kind}'.",
            where=file.path,
            next_step="Give the GGUF file of the model.",
        )
    name = file.fields.get("general.architecture")
    if not isinstance(name, str) or name not in families_by_architecture():
        if isinstance(count := file.fields.get(f"{name}.expert_count"), int) and count > 1:
            raise MixtureOfExperts(name, count, families_by_architecture(), where=file.path)
        raise UnsupportedModel(name, families_by_architecture(), where=file.path)
    return ARCHITECTURES[name]


def _rope(keys: Keys, max_positions: int) -> dict[str, Any]:
    """As llama.cpp reads it: a factor without a type is linear, YaRN's base context is the trained one."""
    rope: dict[str, Any] = {"rope_theta": decimal(keys.number("rope.freq_base", 10000.0)), "rope_type": "default"}
    legacy = keys.number("rope.scale_linear", 0.0)
    factor = decimal(keys.number("rope.scaling.factor", legacy)) or 1.0
    scaling = keys.take("rope.scaling.type", "linear")
    finetuned = keys.take("rope.scaling.finetuned", True)
    if not finetuned and "logits_divisor" in keys.arch.computes:
        raise keys.refused("rope.scaling.finetuned", finetuned, "it switches RoPE off")
    original = keys.count("rope.scaling.original_context_length", max_positions)
    magnitude = decimal(keys.number("rope.scaling.attn_factor", 1.0))
    known = ("none", "linear", "yarn", *(["longrope"] if "longrope" in keys.arch.ropes else []))
    if scaling not in known:
        raise keys.refused("rope.scaling.type", scaling, "its factors are not read")
    for name, taken in _YARN.items():
        value = keys.number(f"rope.scaling.yarn_{name}", taken[0])
        if scaling == "yarn" and value not in taken:
            raise keys.refused(f"rope.scaling.yarn_{name}", value, f"llama.cpp takes it for {taken[-1]:g} here")
    if scaling == "yarn":
        rope |= {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": original}
        # In `mistral3` another magnitude takes the place of YaRN's own.
        weight = (
            keys.number("rope.scaling.yarn_log_multiplier", 0.0) if "query_temperature" in keys.arch.computes else 0
        )
        grown = 1.0 + 0.1 * math.log(max(factor, 1.0))
        if magnitude != 1.0 or weight:
            rope["attention_factor"] = decimal(magnitude * grown / (1.0 + weight * (grown - 1.0)))
    elif keys.arch.fused or scaling == "longrope":  # `phi3` goes by its tensors, whatever its type
        rope |= {"rope_type": "longrope", "original_max_position_embeddings": original, "attention_factor": magnitude}
    elif magnitude != 1.0:
        raise keys.refused("rope.scaling.attn_factor", magnitude, "it scales attention without YaRN")
    elif scaling == "linear" and factor != 1.0:
        rope |= {"rope_type": "linear", "factor": factor}
    return rope


def _windows(keys: Keys, num_layers: int, max_positions: int) -> tuple[int | None, tuple[bool, ...]]:
    """The window, and which layers have it."""
    arch = keys.arch
    window = keys.take("attention.sliding_window", arch.window)
    if not isinstance(window, int) or isinstance(window, bool) or window < 0:
        raise keys.refused("attention.sliding_window", window, "it is no size")
    if arch.kinds != "listed":
        if 0 < window < max_positions:
            raise keys.refused(
                "attention.sliding_window", window, "llama.cpp attends to everything in this architecture"
            )
        return None, (False,) * num_layers
    pattern = keys.take("attention.sliding_window_pattern", arch.period)
    listed = pattern if isinstance(pattern, list) else [pattern]
    sane = all(isinstance(one, int) and 0 <= one <= num_layers + 1 for one in listed)
    if not sane or (isinstance(pattern, list) and len(pattern) != num_layers):
        raise keys.refused("attention.sliding_window_pattern", pattern, f"it says nothing of {num_layers} layers")
    if not window:
        return None, (False,) * num_layers
    return window, tuple(has_window(arch, layer, pattern) for layer in range(num_layers))


def _local_theta(keys: Keys, theta: float) -> float:
    if keys.arch.kinds != "listed":
        return theta
    found = decimal(keys.number("rope.freq_base_swa", keys.arch.local_base or theta))
    return theta if keys.arch.one_base else found


def _ffn(keys: Keys, num_layers: int) -> tuple[list[int], dict[str, float | None]]:
    """Units of the FFN of each layer, and what the file says of them where they are experts."""
    if "experts" not in keys.arch.computes:
        return keys.per_layer("feed_forward_length", num_layers), {}
    count, picked = keys.count("expert_count"), keys.count("expert_used_count")
    size = keys.count("expert_feed_forward_length", keys.count("feed_forward_length", 1) // picked or None)
    return [count] * num_layers, {"expert_size": size, "experts_per_token": picked, "shares_sum_to_one": True}


def _temperature(keys: Keys, rope: Mapping[str, Any]) -> float | None:
    if "query_temperature" not in keys.arch.computes:
        return None
    beta = decimal(keys.number("attention.temperature_scale", 0.0))
    if beta and rope["rope_type"] != "yarn":
        raise keys.refused("attention.temperature_scale", beta, "its length is that of YaRN, which is not there")
    return beta


def _facts(keys: Keys, scale: float, head_dim: int) -> dict[str, float | None]:
    """Scales and caps, as llama.cpp takes them where the file does not say."""
    computes, facts = keys.arch.computes, dict[str, float | None]()
    if "logits_divisor" in computes:
        facts["logits_divisor"] = decimal(keys.number("logit_scale"))
        for field, key in (("residual_scale", "residual_scale"), ("embedding_scale", "embedding_scale")):
            facts[field] = decimal(keys.number(key, 0.0)) or 1.0
        facts["attention_scale"] = decimal(keys.number("attention.scale", 0.0)) or scale
        return facts
    said = keys.number("attention.scale", 0.0)
    if said and not math.isclose(said, scale, rel_tol=1e-6):
        raise keys.refused("attention.scale", said, f"heads of {head_dim} are scaled by {scale:g}")
    if "attention_scale" in computes:
        facts["attention_scale"] = scale
    for field, key, default in (
        ("attention_softcap", "attn_logit_softcapping", 50.0),
        ("final_softcap", "final_logit_softcapping", 30.0),
    ):
        if field in computes:
            facts[field] = decimal(keys.number(key, default if field in keys.arch.always else 0.0)) or None
    return facts


def _check_layers(metadata: Metadata, where: Path) -> None:
    for idx, layer in enumerate(metadata.layers):
        heads, kv_heads = layer.num_heads, layer.num_kv_heads
        if heads and not kv_heads:
            raise UnsupportedError(
                f"Layer {idx} of this GGUF file has query heads and no KV heads: its attention is a single matrix.",
                where=where,
                next_step=NEXT_STEP,
            )
        if heads and not layer.ffn_size:
            # llama.cpp leaves such a layer before it adds the attention's output.
            raise UnsupportedError(
                f"Layer {idx} of this GGUF file has attention and no FFN; llama.cpp drops the attention with it.",
                where=where,
                next_step=NEXT_STEP,
            )
        if kv_heads > heads or (heads and heads % kv_heads):
            raise DamagedFile(where, f"{heads} heads of layer {idx} cannot share {kv_heads} KV heads evenly")
