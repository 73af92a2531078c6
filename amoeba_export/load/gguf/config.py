"""The config of transformers that a GGUF file stands for."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import numpy as np

from amoeba_export.errors import DamagedFile, UnsupportedError
from amoeba_export.gguf_file import GgufFile
from amoeba_export.ir import Architecture
from amoeba_export.llama_cpp.architectures import gguf_place
from amoeba_export.load.family_file import FamilyFile
from amoeba_export.load.gguf.keys import NEXT_STEP, decimal
from amoeba_export.load.gguf.metadata import LayerSize, Metadata
from amoeba_export.load.gguf.rope import llama3_parameters
from amoeba_export.load.kinds import FULL, SLIDING, TYPES_KEY

ROPE_FREQS = "rope_freqs.weight"
LONG_FACTORS, SHORT_FACTORS = "rope_factors_long.weight", "rope_factors_short.weight"

_BIAS_FLAGS = ("qkv_bias", "o_bias", "mlp_bias")


def rope_tensors(metadata: Metadata) -> Collection[str]:
    """Tensors that an architecture reads as part of RoPE."""
    names = {ROPE_FREQS} if "llama3" in metadata.arch.ropes else set[str]()
    return names | ({LONG_FACTORS, SHORT_FACTORS} if "longrope" in metadata.arch.ropes else set())


def model_config(file: GgufFile, metadata: Metadata, family: FamilyFile, size: LayerSize) -> dict[str, Any]:
    """The config of a stock model; flags follow from the tensors.

    Raises:
        DamagedFile: A tensor is missing or has another shape.
        UnsupportedError: Something that the family does not have.
    """
    embedding = file.tensors.get(gguf_place(metadata.arch, "embedding", None, "weight").tensor)
    if embedding is None:
        raise DamagedFile(file.path, "token_embd.weight is not in it")
    config: dict[str, Any] = {
        "model_type": family.family.model_type,
        "vocab_size": embedding.shape[0],
        "hidden_size": metadata.hidden_size,
        "num_hidden_layers": len(metadata.layers),
        "num_attention_heads": size.num_heads,
        "num_key_value_heads": size.num_kv_heads,
        "head_dim": metadata.head_dim,
        str(family.key("ffn_size")): size.ffn_size,
        "max_position_embeddings": metadata.max_positions,
        "rms_norm_eps": metadata.norm_eps,
        "tie_word_embeddings": gguf_place(metadata.arch, "head", None, "weight").tensor not in file.tensors,
    }
    config |= _rope(file, metadata, family)
    config |= _windows(metadata, family)
    config |= _facts(file, metadata, family)
    for flag in _BIAS_FLAGS:
        key = family.key(flag)
        if key is not None and flag not in family.constants:
            there = any(
                gguf_place(metadata.arch, template.role, idx, "bias").tensor in file.tensors
                for template in family.family.layer
                if template.when == flag
                for idx in range(len(metadata.layers))
            )
            config[key] = there or config.get(key, False)
    return config


def _windows(metadata: Metadata, family: FamilyFile) -> dict[str, Any]:
    """Which layers have the window, and which are not rotated."""
    config: dict[str, Any] = {}
    key = family.key("sliding_window")
    if key is not None and not family.window.get("enabled"):
        config[key] = metadata.window
    if metadata.arch.kinds == "listed" or "full_every" in family.window:
        config[TYPES_KEY] = [SLIDING if is_local else FULL for is_local in metadata.local]
    if (rule := family.rope.get("skipped")) is not None:
        config[rule["key"]] = [int(is_rotated) for is_rotated in metadata.rotated]
    return config


def _facts(file: GgufFile, metadata: Metadata, family: FamilyFile) -> dict[str, Any]:
    """Scales and caps under the family's keys; what it has no key for must be Llama's."""
    config: dict[str, Any] = {}
    neutral = {
        **{name: family.constants[name] or None for name in metadata.facts if name in family.constants},
        "attention_scale": metadata.head_dim**-0.5,
    }
    for field, value in metadata.facts.items():
        entry = None if field in family.constants else family.config.get(field)
        if entry is None:
            plain = neutral.get(field, Architecture.__dataclass_fields__[field].default)
            if value != plain and not (value and plain and np.isclose(value, plain, rtol=1e-6)):
                raise UnsupportedError(
                    f"A GGUF file of '{metadata.arch.name}' whose {field} is {value:g} is not supported.",
                    where=file.path,
                    next_step=NEXT_STEP,
                )
        elif isinstance(entry, str):
            config[entry] = value
        elif value is not None:
            said = value ** (1 / entry.get("power", 1))
            config[entry["key"]] = round(said) if np.isclose(said, round(said), rtol=1e-5) else said
    return config


def _rope(file: GgufFile, metadata: Metadata, family: FamilyFile) -> dict[str, Any]:
    """`rope_parameters`, by layer type where the family has several."""
    rope = _with_tensors(file, metadata)
    if metadata.temperature is not None and (key := family.rope.get("temperature")):
        rope[key] = metadata.temperature
    if metadata.rope_dims != metadata.head_dim:
        rope["partial_rotary_factor"] = metadata.rope_dims / metadata.head_dim
    if family.rope.get("by_layer_type"):
        local = {"rope_type": "default", "rope_theta": metadata.local_theta}
        return {"rope_parameters": {FULL: rope, SLIDING: local}}
    original = rope.get("original_max_position_embeddings")
    at_top = {"original_max_position_embeddings": original} if rope["rope_type"] == "longrope" else {}
    return {"rope_parameters": rope, **at_top}


def _with_tensors(file: GgufFile, metadata: Metadata) -> dict[str, Any]:
    rope, half = dict(metadata.rope), metadata.rope_dims // 2
    present = [name for name in rope_tensors(metadata) if name in file.tensors]
    for name in present:
        if (shape := file.tensors[name].shape) != (half,):
            raise DamagedFile(file.path, f"{name} has shape {list(shape)} and should have [{half}]")
    if rope["rope_type"] == "longrope":
        if not {LONG_FACTORS, SHORT_FACTORS} <= set(present):
            if rope["attention_factor"] == 1.0 and not present:
                return {"rope_theta": rope["rope_theta"], "rope_type": "default"}
            raise DamagedFile(file.path, f"{LONG_FACTORS} and {SHORT_FACTORS} are not both in it")
        for key, name in (("long_factor", LONG_FACTORS), ("short_factor", SHORT_FACTORS)):
            rope[key] = [decimal(float(value)) for value in file.tensors[name].read()]
        return rope
    if ROPE_FREQS not in present:
        return rope
    found = llama3_parameters(file.tensors[ROPE_FREQS].read(), theta=rope["rope_theta"])
    if found is None or (found and rope["rope_type"] != "default"):
        reason = "together with another scaling" if found else "that no RoPE of transformers has"
        raise UnsupportedError(
            f"The factors in {ROPE_FREQS} are divisors {reason}.", where=file.path, next_step=NEXT_STEP
        )
    return rope | found
