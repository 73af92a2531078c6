"""Run single layers of a supernet, whole or cut, without ever building the model.

The layers are transformers' own decoder layers, one at a time with the weights of the layer that is asked for, so that
every family computes what it computes elsewhere. All arithmetic is fp32.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn

from amoeba_export.ir import Importance, LayerPlan, Supernet
from amoeba_export.ir.architecture import Compensation, has_compensation
from amoeba_export.model.opening import blank_model, read_config


@dataclass(slots=True)
class Work:
    """Forwards done, for progress and for proofs. Does not count cut layers by their size.

    Attributes:
        layer_tokens: Tokens times layers that they went through, padding included.
        head_logits: Tokens times vocabulary rows that they were multiplied with.
    """

    layer_tokens: int = 0
    head_logits: int = 0


class LayerStack:
    """The layers, embedding and final norm of a supernet. Adapters of the supernet are not applied.

    Args:
        supernet: Its weights are read when they are needed.
        memory_bytes: All layers stay in memory when they take at most half of it in fp32; else each one is read
            whenever it is asked for.

    Attributes:
        layer_bytes: Weights of one layer in fp32.
        is_resident: Whether all layers stay in memory.
        head_layers: Layers that cost as much as the vocabulary head.
    """

    def __init__(self, supernet: Supernet, *, memory_bytes: int) -> None:
        self.architecture = supernet.architecture
        self.tensors = supernet.tensors
        self.work = Work()
        self.memory_bytes = memory_bytes
        config = read_config(supernet.folder)
        config.num_hidden_layers = 1
        if getattr(config, "layer_types", None):
            config.layer_types = config.layer_types[:1]
        config._attn_implementation = "sdpa"
        with torch.device("meta"):
            model = blank_model(config).eval().model
        self._blank = model.layers[0]
        self._rotary = type(model.rotary_emb)(config)
        self._norm = model.norm
        self._norm.load_state_dict({"weight": self._weight("model.norm.weight")}, assign=True)
        num_weights = sum(weight.numel() for weight in self._blank.state_dict().values())
        self.layer_bytes = 4 * num_weights
        self.is_resident = self.layer_bytes * self.architecture.num_layers <= memory_bytes // 2
        self.head_layers = self.architecture.vocab_size * self.architecture.hidden_size // num_weights
        self._resident: dict[int, nn.Module] = {}
        self._positions: dict[int, tuple[tuple[torch.Tensor, torch.Tensor], torch.Tensor | None]] = {}

    def _weight(self, name: str) -> torch.Tensor:
        return self.tensors.read(name).to(torch.float32, copy=True)

    def embed(self, tokens_BT: torch.Tensor) -> torch.Tensor:
        """Input of layer 0. [B, T, D]. Only the rows that are looked up are read."""
        return self.tensors.read("model.embed_tokens.weight")[tokens_BT].to(torch.float32)

    def norm(self, hidden_TD: torch.Tensor) -> torch.Tensor:
        """The final norm. [T, D]."""
        normed: torch.Tensor = self._norm(hidden_TD)
        return normed

    def layer(self, layer_idx: int) -> nn.Module:
        """Layer `layer_idx` as it is."""
        if layer_idx in self._resident:
            return self._resident[layer_idx]
        module: nn.Module = copy.deepcopy(self._blank)
        names = module.state_dict()
        module.load_state_dict({name: self._weight(f"model.layers.{layer_idx}.{name}") for name in names}, assign=True)
        if self.is_resident:
            self._resident[layer_idx] = module
        return module

    def cut_layer(self, plan: LayerPlan, importance: Importance, *, compensation: Compensation) -> nn.Module:
        """The layer of `plan`, sliced, with the mean of what it lost as biases: what a materialized subnet computes."""
        layer, arch = plan.source_layer, self.architecture
        module: Any = copy.deepcopy(self._blank)
        weights = dict(self.layer(layer).state_dict())
        query_I = _channels(plan.query_heads, arch.head_dim)
        kv_I = _channels(plan.kv_heads, arch.head_dim)
        ffn_I = torch.tensor(plan.ffn, dtype=torch.int64)
        for name, mean_I, kept_I in (
            ("self_attn.o_proj", importance.o_mean_LQ[layer], query_I),
            ("mlp.down_proj", importance.down_mean_LF[layer], ffn_I),
        ):
            w_OI = weights[f"{name}.weight"]
            if has_compensation(compensation, kept=len(kept_I), whole=w_OI.shape[1]):
                removed_mean_I = torch.tensor(mean_I, dtype=torch.float64)
                removed_mean_I[kept_I] = 0.0
                bias_O = (w_OI.double() @ removed_mean_I).float()
                weights[f"{name}.bias"] = weights[f"{name}.bias"] + bias_O if f"{name}.bias" in weights else bias_O
            weights[f"{name}.weight"] = w_OI[:, kept_I]
        rows = {"q_proj": query_I, "k_proj": kv_I, "v_proj": kv_I, "gate_proj": ffn_I, "up_proj": ffn_I}
        for name, weight in weights.items():
            projection = name.split(".")[1]
            if projection in rows:
                weights[name] = weight[rows[projection]]
        for name, weight in weights.items():
            owner, _, kind = name.rpartition(".")
            setattr(module.get_submodule(owner), kind, nn.Parameter(weight, requires_grad=False))
        if plan.query_heads:
            module.self_attn.num_key_value_groups = len(plan.query_heads) // len(plan.kv_heads)
        else:
            module.self_attn = _NoAttention(weights.get("self_attn.o_proj.bias"))
        return cast(nn.Module, module)

    def run(self, module: nn.Module, hidden_BTD: torch.Tensor) -> torch.Tensor:
        """The output of one layer. [B, T, D]."""
        num_tokens = hidden_BTD.shape[1]
        if num_tokens not in self._positions:
            positions = torch.arange(num_tokens)[None]
            self._positions[num_tokens] = (self._rotary(hidden_BTD, positions), self._mask(num_tokens))
        embeddings, mask = self._positions[num_tokens]
        self.work.layer_tokens += hidden_BTD.shape[0] * num_tokens
        output: torch.Tensor = module(hidden_BTD, attention_mask=mask, position_embeddings=embeddings)
        return output

    def _mask(self, num_tokens: int) -> torch.Tensor | None:
        """None is causal. A sliding window only needs a mask where samples are longer than it."""
        window = self.architecture.sliding_window
        if window is None or num_tokens <= window:
            return None
        return torch.ones(num_tokens, num_tokens, dtype=torch.bool).tril().triu(1 - window)[None, None]


class _NoAttention(nn.Module):
    """An attention block that kept no head: its compensation bias, or nothing."""

    def __init__(self, bias_D: torch.Tensor | None) -> None:
        super().__init__()
        self.bias_D = bias_D

    def forward(self, hidden_states: torch.Tensor, **_: Any) -> tuple[torch.Tensor, None]:
        added = torch.zeros_like(hidden_states)
        return (added if self.bias_D is None else added + self.bias_D), None


def _channels(heads: tuple[int, ...], head_dim: int) -> torch.Tensor:
    """Channels of the heads, in order."""
    return (torch.tensor(heads, dtype=torch.int64)[:, None] * head_dim + torch.arange(head_dim)).reshape(-1)
