"""Which architecture of llama.cpp computes a plan, and which tensors its loader expects.

Read from llama.cpp's `src/models/{llama,deci,qwen2,qwen3}.cpp`:

- `llama` takes optional biases everywhere, with one width for all layers. `deci` is `llama` with a width per layer.
  Both rotate neighbouring pairs, so rows of q and k are permuted; `qwen2` and `qwen3` rotate halves, as sources do.
- `qwen2` wants query heads that span the hidden size and has no output biases. `qwen3` has no biases at all.
- `deci` skips a layer without FFN before its attention is added, ignores the output bias of a layer without attention,
  and takes the head dim from layer 0. So a removed FFN becomes `BLOCK` neurons of zeros, the constant that a removed
  attention leaves joins the FFN bias of the layer before, and layer 0 always has a head, if need be one of zeros.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import gguf
import torch

from amoeba_export.errors import NotRepresentable
from amoeba_export.ir import DenseArchitecture, LayerDims

BLOCK = 32
"""Weights that share a scale in Q8_0 and Q4_0. Rows of a quantized tensor are multiples of it."""

_ELSEWHERE = ("--format safetensors", "--format onnx")

_YARN_KEYS: Mapping[str, Collection[Any] | None] = {
    "rope_type": None,
    "factor": None,
    "original_max_position_embeddings": None,
    "attention_factor": None,
    "mscale": None,
    "mscale_all_dim": None,
    "beta_fast": (32,),
    "beta_slow": (1,),
    "truncate": (True,),
}
"""What YaRN may say; None is any value. llama.cpp does not read the betas, and computes with these."""

ARCHITECTURES = {
    "llama": gguf.MODEL_ARCH.LLAMA,
    "deci": gguf.MODEL_ARCH.DECI,
    "qwen2": gguf.MODEL_ARCH.QWEN2,
    "qwen3": gguf.MODEL_ARCH.QWEN3,
}


def choose_architecture(dense: DenseArchitecture) -> str:
    """A key of `ARCHITECTURES`. Raises `NotRepresentable`, saying what llama.cpp lacks."""
    base, layers = dense.base, dense.layers
    rope_type = (base.rope_scaling or {}).get("rope_type", "default")
    if rope_type not in ("default", "linear", "yarn", "llama3"):
        raise NotRepresentable("GGUF", f"RoPE of type {rope_type} is not written there", _ELSEWHERE)
    if rope_type == "yarn":
        unread = sorted(key for key, value in (base.rope_scaling or {}).items() if not _is_read(key, value))
        if unread:
            raise NotRepresentable("GGUF", f"llama.cpp's YaRN does not read {', '.join(unread)}", _ELSEWHERE)
    window = base.sliding_window
    if window is not None and window < base.max_positions:
        raise NotRepresentable(
            "GGUF",
            f"llama.cpp has no attention window here, and this model one of {window} tokens",
            (*_ELSEWHERE, f"max_position_embeddings = {window} in its config.json, for texts that the window spans"),
        )
    if base.config.get("hidden_act", "silu") not in ("silu", "swish"):
        raise NotRepresentable("GGUF", f"its activation is {base.config['hidden_act']}, not silu", _ELSEWHERE)
    whole_blocks = all(dims.num_heads and dims.ffn_size for dims in layers)
    if base.qk_norm:
        if not dense.is_uniform or not whole_blocks:
            raise NotRepresentable("GGUF", "llama.cpp has no per-layer widths together with QK norms", _ELSEWHERE)
        if any((layers[0].qkv_bias, layers[0].o_bias, layers[0].gate_up_bias, layers[0].down_bias)):
            raise NotRepresentable(
                "GGUF",
                "llama.cpp has no biases together with QK norms",
                (*_ELSEWHERE, "a shape of width 1"),
            )
        if rope_type == "llama3":
            raise NotRepresentable("GGUF", "llama.cpp has no llama3 RoPE together with QK norms", _ELSEWHERE)
        return "qwen3"
    if not dense.is_uniform or not whole_blocks:
        return "deci"
    is_qwen2 = base.family == "qwen2" and rope_type != "llama3" and base.num_heads * base.head_dim == base.hidden_size
    return "qwen2" if is_qwen2 and dense.has_whole_layers else "llama"


def _is_read(key: str, value: Any) -> bool:
    allowed = _YARN_KEYS.get(key, ())
    return value is None or allowed is None or value in allowed


def yarn_magnitude(scaling: Mapping[str, Any]) -> float:
    """By what YaRN multiplies sine and cosine, as a share of llama.cpp's own 0.1 ln(factor) + 1."""

    def grown(weight: float) -> float:
        return 1.0 + 0.1 * weight * math.log(max(scaling["factor"], 1.0))

    magnitude = scaling.get("attention_factor")
    if magnitude is None:
        mscale, mscale_all_dim = scaling.get("mscale"), scaling.get("mscale_all_dim")
        magnitude = grown(mscale) / grown(mscale_all_dim) if mscale and mscale_all_dim else grown(1.0)
    return float(magnitude / grown(1.0))


def written_layers(dense: DenseArchitecture, architecture: str, *, quantized: bool) -> tuple[LayerDims, ...]:
    """The dims that the file says: those of the plan, plus the zeros that llama.cpp or a quantized row needs.

    Neurons and heads of zeros add exactly nothing to the output.
    """
    written = []
    for idx, dims in enumerate(dense.layers):
        ffn_size = dims.ffn_size
        if quantized or not ffn_size:
            ffn_size = max(-(-ffn_size // BLOCK), 1) * BLOCK
        layer = dataclasses.replace(dims, ffn_size=ffn_size)
        if architecture == "deci":
            # Constants of later layers without attention may land in any FFN bias.
            follower = dense.layers[idx + 1] if idx + 1 < len(dense.layers) else None
            if follower is not None and not follower.num_heads and follower.o_bias:
                layer = dataclasses.replace(layer, down_bias=True)
            if not dims.num_heads and idx == 0:
                layer = dataclasses.replace(layer, num_heads=1, num_kv_heads=1)
            elif not dims.num_heads:
                layer = dataclasses.replace(layer, o_bias=False, qkv_bias=False)
        written.append(layer)
    return tuple(written)


def expected_tensors(dense: DenseArchitecture, layers: tuple[LayerDims, ...]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Name and shape (as in torch) of every tensor in the file, in file order."""
    base = dense.base
    hidden = base.hidden_size
    yield "token_embd.weight", (base.vocab_size, hidden)
    yield "output_norm.weight", (hidden,)
    if not base.tied_embeddings:
        yield "output.weight", (base.vocab_size, hidden)
    if rope_factors(dense) is not None:
        yield "rope_freqs.weight", (base.head_dim // 2,)
    for idx, dims in enumerate(layers):
        query, kv = dims.num_heads * base.head_dim, dims.num_kv_heads * base.head_dim
        tensors: list[tuple[str, tuple[int, ...], bool]] = [
            ("attn_norm.weight", (hidden,), bool(query)),
            ("attn_q.weight", (query, hidden), bool(query)),
            ("attn_q.bias", (query,), bool(query) and dims.qkv_bias),
            ("attn_k.weight", (kv, hidden), bool(query)),
            ("attn_k.bias", (kv,), bool(query) and dims.qkv_bias),
            ("attn_v.weight", (kv, hidden), bool(query)),
            ("attn_v.bias", (kv,), bool(query) and dims.qkv_bias),
            ("attn_q_norm.weight", (base.head_dim,), base.qk_norm),
            ("attn_k_norm.weight", (base.head_dim,), base.qk_norm),
            ("attn_output.weight", (hidden, query), bool(query)),
            ("attn_output.bias", (hidden,), dims.o_bias),
            ("ffn_norm.weight", (hidden,), True),
            ("ffn_gate.weight", (dims.ffn_size, hidden), True),
            ("ffn_gate.bias", (dims.ffn_size,), dims.gate_up_bias),
            ("ffn_up.weight", (dims.ffn_size, hidden), True),
            ("ffn_up.bias", (dims.ffn_size,), dims.gate_up_bias),
            ("ffn_down.weight", (hidden, dims.ffn_size), True),
            ("ffn_down.bias", (hidden,), dims.down_bias),
        ]
        for name, shape, exists in tensors:
            if exists:
                yield f"blk.{idx}.{name}", shape


def rope_factors(dense: DenseArchitecture) -> torch.Tensor | None:
    """llama3 scaling as llama.cpp takes it: what each frequency is divided by [head_dim / 2]. None for other RoPE.

    Long waves are slowed by `factor`, short ones kept, those between interpolated (Llama 3.1's rule).
    """
    scaling = dense.base.rope_scaling or {}
    if scaling.get("rope_type") != "llama3":
        return None
    half = torch.arange(0, dense.base.head_dim, 2, dtype=torch.float64)
    waves = 2 * torch.pi * dense.base.rope_theta ** (half / dense.base.head_dim)
    factor, low, high = scaling["factor"], scaling["low_freq_factor"], scaling["high_freq_factor"]
    turns = scaling["original_max_position_embeddings"] / waves
    blend = ((turns - low) / (high - low)).clamp(0, 1)
    divisors: torch.Tensor = (1 / ((1 - blend) / factor + blend)).to(torch.float32)
    return divisors


def permute_pairs(w: torch.Tensor, num_heads: int) -> torch.Tensor:
    """Rows of q or k (weight or bias) from rotating halves to rotating neighbouring pairs, head by head."""
    heads = w.reshape(num_heads, 2, -1, *w.shape[1:])
    return heads.transpose(1, 2).reshape(w.shape)
