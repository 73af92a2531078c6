"""What the ONNX tests share: subnets with random weights, a session that steps, and the decoder in plain torch."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from torch import Tensor
from torch.nn import functional

from amoeba_export.formats import FORMATS
from amoeba_export.ir import (
    Architecture,
    DenseArchitecture,
    LayerDims,
    LayerPlan,
    Shape,
    Subnet,
    SubnetPlan,
    TensorSpec,
)
from amoeba_export.load.family_file import read_family

Weights = Mapping[str, Tensor]


def architecture_of(config: Any) -> Architecture:
    """The dims of a tiny model, from its transformers config."""
    rope = dict(config.rope_parameters)
    theta = rope.pop("rope_theta")
    return Architecture(
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
        rope_theta=theta,
        rope_scaling=None if rope["rope_type"] == "default" else rope,
        sliding_window=getattr(config, "sliding_window", None),
        tied_embeddings=config.tie_word_embeddings,
        qkv_bias=config.model_type == "qwen2",
        qk_norm=config.model_type == "qwen3",
        config={"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0},
    )


def subnet_of(dense: DenseArchitecture, weights: Weights, source_folder: Path) -> Subnet:
    """A subnet that streams `weights`. Its plan names as many heads and neurons as `dense` has, the first ones."""
    layers = tuple(
        LayerPlan(
            source_layer=i,
            query_heads=tuple(range(layer.num_heads)),
            kv_heads=tuple(range(layer.num_kv_heads)),
            ffn=tuple(range(layer.ffn_size)),
        )
        for i, layer in enumerate(dense.layers)
    )
    return Subnet(
        architecture=dense,
        family=read_family(dense.base.family).family,
        plan=SubnetPlan(shape=Shape(len(layers), 1.0), policy="adaptive", layers=layers),
        specs=tuple(TensorSpec(name=name, shape=tuple(weight.shape)) for name, weight in weights.items()),
        stream=lambda: iter(weights.items()),
        source_folder=source_folder,
        source_dtype=torch.float32,
        model_name="tiny",
    )


def write_onnx(subnet: Subnet, folder: Path, *, dtype: str = "fp32", **options: Any) -> Path:
    """Write `subnet` into the new folder `folder`."""
    folder.mkdir(parents=True)
    writer = FORMATS["onnx"].open_writer(subnet, folder, dtype=dtype, **options)
    for name, weight in subnet.stream():
        writer.accept(name, weight)
    writer.close()
    return folder


def random_weights(dense: DenseArchitecture, *, seed: int = 0) -> dict[str, Tensor]:
    """Weights of a cut model, named as stock transformers names them, large enough that every block matters."""
    generator = torch.Generator().manual_seed(seed)
    base = dense.base
    hidden, head_dim = base.hidden_size, base.head_dim

    def normal(*shape: int, mean: float = 0.0, std: float = 0.15) -> Tensor:
        return torch.empty(shape).normal_(mean, std, generator=generator)

    weights = {"model.embed_tokens.weight": normal(base.vocab_size, hidden, std=1.0)}
    for i, dims in enumerate(dense.layers):
        attention, mlp = f"model.layers.{i}.self_attn", f"model.layers.{i}.mlp"
        if dims.num_heads:
            weights[f"model.layers.{i}.input_layernorm.weight"] = normal(hidden, mean=1.0)
            for part, heads in (("q", dims.num_heads), ("k", dims.num_kv_heads), ("v", dims.num_kv_heads)):
                weights[f"{attention}.{part}_proj.weight"] = normal(heads * head_dim, hidden)
                if dims.qkv_bias:
                    weights[f"{attention}.{part}_proj.bias"] = normal(heads * head_dim)
                if base.qk_norm and part != "v":
                    weights[f"{attention}.{part}_norm.weight"] = normal(head_dim, mean=1.0)
            weights[f"{attention}.o_proj.weight"] = normal(hidden, dims.num_heads * head_dim)
        if dims.o_bias:
            weights[f"{attention}.o_proj.bias"] = normal(hidden, std=0.5)
        if dims.ffn_size:
            weights[f"model.layers.{i}.post_attention_layernorm.weight"] = normal(hidden, mean=1.0)
            for part in ("gate", "up"):
                weights[f"{mlp}.{part}_proj.weight"] = normal(dims.ffn_size, hidden)
                if dims.gate_up_bias:
                    weights[f"{mlp}.{part}_proj.bias"] = normal(dims.ffn_size)
            weights[f"{mlp}.down_proj.weight"] = normal(hidden, dims.ffn_size)
        if dims.down_bias:
            weights[f"{mlp}.down_proj.bias"] = normal(hidden, std=0.5)
    weights["model.norm.weight"] = normal(hidden, mean=1.0)
    if not base.tied_embeddings:
        weights["lm_head.weight"] = normal(base.vocab_size, hidden)
    return weights


def torch_logits(dense: DenseArchitecture, weights: Weights, ids_BT: Tensor) -> Tensor:
    """The decoder, written down once more: logits [B, T, V] of unpadded rows."""
    base = dense.base
    num_tokens = ids_BT.shape[1]
    half = base.head_dim // 2
    frequency_H = base.rope_theta ** (-torch.arange(half, dtype=torch.float64) / half)
    angle_TH = (torch.arange(num_tokens, dtype=torch.float64)[:, None] * frequency_H).float()
    causal_TT = torch.full((num_tokens, num_tokens), float("-inf")).triu(1)

    def norm(x: Tensor, name: str) -> Tensor:
        return functional.rms_norm(x, x.shape[-1:], weights[f"{name}.weight"], base.norm_eps)

    def linear(x: Tensor, name: str) -> Tensor:
        return functional.linear(x, weights[f"{name}.weight"], weights.get(f"{name}.bias"))

    def rotate(x_BNTH: Tensor) -> Tensor:
        first, second = x_BNTH.chunk(2, -1)
        cos, sin = angle_TH.cos(), angle_TH.sin()
        return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)

    def attention(x_BTD: Tensor, name: str, dims: LayerDims) -> Tensor:
        def heads(part: str, count: int) -> Tensor:
            x = linear(x_BTD, f"{name}.{part}_proj").unflatten(-1, (count, base.head_dim))
            if base.qk_norm and part != "v":
                x = norm(x, f"{name}.{part}_norm")
            return x.transpose(1, 2)

        group = dims.num_heads // dims.num_kv_heads
        query = rotate(heads("q", dims.num_heads))
        key = rotate(heads("k", dims.num_kv_heads)).repeat_interleave(group, 1)
        value = heads("v", dims.num_kv_heads).repeat_interleave(group, 1)
        scores = query @ key.transpose(-1, -2) / base.head_dim**0.5 + causal_TT
        context = (scores.softmax(-1) @ value).transpose(1, 2).flatten(2)
        return functional.linear(context, weights[f"{name}.o_proj.weight"])

    x = weights["model.embed_tokens.weight"][ids_BT]
    for i, dims in enumerate(dense.layers):
        layer = f"model.layers.{i}"
        if dims.num_heads:
            x = x + attention(norm(x, f"{layer}.input_layernorm"), f"{layer}.self_attn", dims)
        if dims.o_bias:
            x = x + weights[f"{layer}.self_attn.o_proj.bias"]
        if dims.ffn_size:
            inner = norm(x, f"{layer}.post_attention_layernorm")
            gated = functional.silu(linear(inner, f"{layer}.mlp.gate_proj")) * linear(inner, f"{layer}.mlp.up_proj")
            x = x + functional.linear(gated, weights[f"{layer}.mlp.down_proj.weight"])
        if dims.down_bias:
            x = x + weights[f"{layer}.mlp.down_proj.bias"]
    head = weights.get("lm_head.weight", weights["model.embed_tokens.weight"])
    return norm(x, "model.norm") @ head.T


class OnnxDecoder:
    """A session of onnxruntime with its KV cache: call it with the next tokens of each row."""

    def __init__(self, folder: Path) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        options.log_severity_level = 3
        self._session = onnxruntime.InferenceSession(str(folder / "model.onnx"), options)
        self.input_names = [value.name for value in self._session.get_inputs()]
        self.output_names = [value.name for value in self._session.get_outputs()]
        self._past: dict[str, np.ndarray[Any, Any]] = {}

    def __call__(self, ids_BS: Tensor, mask_BT: Tensor | None = None) -> Tensor:
        """Logits of new tokens. The mask covers everything so far; without one nothing is padding."""
        past = self._past or self._empty(len(ids_BS))
        cached = next(iter(past.values())).shape[2] if past else 0
        mask = torch.ones(len(ids_BS), cached + ids_BS.shape[1], dtype=torch.long) if mask_BT is None else mask_BT
        feeds = {"input_ids": ids_BS.numpy(), "attention_mask": mask.numpy(), **past}
        results = dict(
            zip(
                self.output_names,
                self._session.run(None, {name: feeds[name] for name in self.input_names}),
                strict=True,
            )
        )
        logits = torch.from_numpy(results.pop("logits")).float()
        self._past = {name.replace("present", "past_key_values"): value for name, value in results.items()}
        return logits

    def reset(self) -> None:
        """Forget all tokens."""
        self._past = {}

    def _empty(self, batch: int) -> dict[str, np.ndarray[Any, Any]]:
        types = {"tensor(float)": np.float32, "tensor(float16)": np.float16}
        return {
            value.name: np.zeros((batch, value.shape[1], 0, value.shape[3]), types[value.type])
            for value in self._session.get_inputs()
            if value.name.startswith("past_key_values")
        }
