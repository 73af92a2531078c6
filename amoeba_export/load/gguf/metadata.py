"""What the metadata of a GGUF file says of the function, as a config of transformers.

llama.cpp computes from the keys of its architecture and ignores what it does not know. Here every key is read, or
known to change nothing, or refused by name: a key that is new to us may be one that scales, caps or masks something.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from amoeba_export.errors import DamagedFile, UnsupportedError, UnsupportedModel
from amoeba_export.gguf_file import GgufFile

FAMILIES = {"llama": "llama", "deci": "llama", "granite": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
"""Architecture of llama.cpp -> our family. `granite` is `llama` with multipliers, which must be neutral; `deci` is
`llama` with widths per layer."""

PAIRED = ("llama", "deci", "granite")
"""These rotate neighbouring pairs; transformers and the others rotate the two halves of a head."""

NEXT_STEP = "Give the model as a Hugging Face folder instead."

_NEUTRAL: Mapping[str, Collection[Any]] = {
    "attention.causal": (True,),
    "attention.clamp_kqv": (0.0,),
    "attention.max_alibi_bias": (0.0,),
    "attn_logit_softcapping": (0.0,),
    "embedding_scale": (0.0, 1.0),
    "expert_count": (0,),
    "expert_used_count": (0,),
    "final_logit_softcapping": (0.0,),
    "logit_scale": (0.0, 1.0),
    "nextn_predict_layers": (0,),
    "residual_scale": (0.0, 1.0),
    "rope.scaling.yarn_log_multiplier": (0.0,),
}
"""Key -> the values of it that change nothing. 0 means unset to llama.cpp."""

_DESCRIPTIVE = ("vocab_size", "tensor_data_layout", "use_parallel_residual")
"""Say nothing that llama.cpp computes with in these architectures; the vocabulary's size is that of the embedding."""

_YARN = {"ext_factor": (-1.0, 1.0), "attn_factor": (-1.0, 1.0), "beta_fast": (32.0,), "beta_slow": (1.0,)}
"""`rope.scaling.yarn_*`, which converters write and llama.cpp does not read in these architectures -> what it computes
with instead. Another value means that the file and its model differ."""


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
        arch: llama.cpp's name of the architecture.
        rope: As `rope_parameters` of transformers; `rope_freqs.weight` may still add to it.
    """

    arch: str
    layers: tuple[LayerSize, ...]
    hidden_size: int
    head_dim: int
    max_positions: int
    norm_eps: float
    rope: Mapping[str, Any]


def decimal(value: float) -> float:
    """The shortest decimal of a number that was rounded to fp32: what it was before."""
    return float(str(np.float32(value)))


def read_metadata(file: GgufFile) -> Metadata:
    """Read every key that changes the function.

    Raises:
        UnsupportedModel: Another architecture.
        UnsupportedError: A key that we do not compute, named.
        DamagedFile: A key is missing, or has a value that is none.
    """
    kind = file.fields.get("general.type", "model")
    if kind != "model":
        raise UnsupportedError(
            f"This GGUF file holds no model: its general.type is '{kind}'.",
            where=file.path,
            next_step="Give the GGUF file of the model.",
        )
    arch = file.fields.get("general.architecture")
    if arch not in FAMILIES:
        raise UnsupportedModel(arch, FAMILIES, where=file.path)
    keys = _Keys(file, arch)
    num_layers = keys.count("block_count")
    num_heads = keys.per_layer("attention.head_count", num_layers)
    num_kv_heads = keys.per_layer("attention.head_count_kv", num_layers, num_heads)
    ffn_sizes = keys.per_layer("feed_forward_length", num_layers)
    hidden_size = keys.count("embedding_length")
    head_dim = keys.count("attention.key_length", hidden_size // max(num_heads[0], 1))
    value_dim = keys.count("attention.value_length", hidden_size // max(num_heads[0], 1))
    if value_dim != head_dim:
        raise keys.refused("attention.value_length", value_dim, f"keys are {head_dim} long")
    rotated = keys.count("rope.dimension_count", head_dim)
    if rotated != head_dim:
        raise keys.refused("rope.dimension_count", rotated, f"heads are {head_dim} long")
    max_positions = keys.count("context_length")
    window = keys.take("attention.sliding_window", 0)
    if 0 < window < max_positions:
        raise keys.refused("attention.sliding_window", window, "llama.cpp attends to everything in this architecture")
    scale = keys.take("attention.scale", 0.0)
    if scale and not math.isclose(scale, head_dim**-0.5, rel_tol=1e-6):
        raise keys.refused("attention.scale", scale, f"heads of {head_dim} are scaled by {head_dim**-0.5:g}")
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
        rope=_rope(keys, max_positions),
    )
    keys.finish()
    _check_layers(metadata, file.path)
    return metadata


class _Keys:
    """The keys of the architecture, each of which must be asked for or be harmless."""

    def __init__(self, file: GgufFile, arch: str) -> None:
        self._path = file.path
        self._arch = arch
        prefix = f"{arch}."
        self._left = {key.removeprefix(prefix): v for key, v in file.fields.items() if key.startswith(prefix)}

    def take(self, key: str, default: Any = None) -> Any:
        """The value as it is. Raises `DamagedFile` when it is missing and has no default."""
        value = self._left.pop(key, default)
        if value is None:
            raise DamagedFile(self._path, f"it does not say {self._arch}.{key}")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        value = self.take(key, default)
        if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value):
            raise DamagedFile(self._path, f"{self._arch}.{key} is {str(value)[:60]}, which is no number")
        return float(value)

    def count(self, key: str, default: int | None = None) -> int:
        value = self.take(key, default)
        if not isinstance(value, int) or isinstance(value, bool) or not 0 < value < 1 << 31:
            raise DamagedFile(self._path, f"{self._arch}.{key} is {str(value)[:60]}, which is no size")
        return value

    def per_layer(self, key: str, num_layers: int, default: list[int] | None = None) -> list[int]:
        """One number for all layers, or one for each."""
        value = self.take(key, default)
        values = value if isinstance(value, list) else [value]
        sane = all(isinstance(v, int) and not isinstance(v, bool) and 0 <= v < 1 << 24 for v in values)
        if not sane or (isinstance(value, list) and len(value) != num_layers) or num_layers > 1 << 16:
            raise DamagedFile(self._path, f"{self._arch}.{key} does not have a size for each of {num_layers} layers")
        return values if isinstance(value, list) else values * num_layers

    def refused(self, key: str, value: Any, why: str) -> UnsupportedError:
        return UnsupportedError(
            f"A GGUF file with {self._arch}.{key} = {str(value)[:60]} is not supported: {why}.",
            where=self._path,
            next_step=NEXT_STEP,
        )

    def finish(self) -> None:
        """Refuse what is left and not known to be harmless."""
        for key, value in self._left.items():
            if key not in _DESCRIPTIVE and not (isinstance(value, int | float) and value in _NEUTRAL.get(key, ())):
                raise self.refused(key, value, "we do not know what it changes")


def _rope(keys: _Keys, max_positions: int) -> dict[str, Any]:
    """As llama.cpp reads it: a factor without a type is linear, YaRN's base context is the trained one."""
    rope: dict[str, Any] = {"rope_theta": decimal(keys.number("rope.freq_base", 10000.0)), "rope_type": "default"}
    legacy = keys.number("rope.scale_linear", 0.0)
    factor = decimal(keys.number("rope.scaling.factor", legacy)) or 1.0
    scaling = keys.take("rope.scaling.type", "linear")
    finetuned = keys.take("rope.scaling.finetuned", True)
    if not finetuned and keys._arch == "granite":
        raise keys.refused("rope.scaling.finetuned", finetuned, "it switches RoPE off")
    original = keys.count("rope.scaling.original_context_length", max_positions)
    magnitude = decimal(keys.number("rope.scaling.attn_factor", 1.0))
    if scaling not in ("none", "linear", "yarn"):
        raise keys.refused("rope.scaling.type", scaling, "its factors are not read")
    for name, taken in _YARN.items():
        value = keys.number(f"rope.scaling.yarn_{name}", taken[0])
        if scaling == "yarn" and value not in taken:
            raise keys.refused(f"rope.scaling.yarn_{name}", value, f"llama.cpp takes it for {taken[-1]:g} here")
    if scaling == "yarn":
        rope |= {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": original}
        if magnitude != 1.0:
            rope["attention_factor"] = magnitude * (1.0 + 0.1 * math.log(max(factor, 1.0)))
    elif magnitude != 1.0:
        raise keys.refused("rope.scaling.attn_factor", magnitude, "it scales attention without YaRN")
    elif scaling == "linear" and factor != 1.0:
        rope |= {"rope_type": "linear", "factor": factor}
    return rope


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
