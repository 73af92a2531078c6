"""Run single layers of a supernet, whole or cut, without ever building the model.

The layers are transformers' own decoder layers, one at a time with the weights of the layer that is asked for, so that
every family computes what it computes elsewhere. All arithmetic is fp32.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, cast

import torch
from torch import nn

from amoeba_export.ir import Importance, LayerPlan, Supernet, TensorSource
from amoeba_export.ir.architecture import Compensation, has_compensation
from amoeba_export.model.opening import blank_model, read_config

WRITERS = ("self_attn.o_proj", "mlp.down_proj")
"""What writes into the residual stream, in the order of a layer."""

CPU = torch.device("cpu")
NO_BIASES: Mapping[str, torch.Tensor] = MappingProxyType({})


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
        tensors: Where they are read instead, such as with adapters merged.
        device: Where layers run.
        memory_bytes: All layers stay in memory when they take at most half of it in fp32; else each one is read
            whenever it is asked for.

    Attributes:
        layer_bytes: Weights of one layer in fp32.
        is_resident: Whether all layers stay in memory.
        head_layers: Layers that cost as much as the vocabulary head.
    """

    def __init__(
        self,
        supernet: Supernet,
        *,
        memory_bytes: int,
        tensors: TensorSource | None = None,
        device: torch.device = CPU,
    ) -> None:
        self.architecture = supernet.architecture
        self.tensors = tensors or supernet.tensors
        self.device = device
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
        self._rotary = type(model.rotary_emb)(config).to(device)
        self._norm = model.norm
        self._norm.load_state_dict({"weight": self.weight("model.norm.weight")}, assign=True)
        num_weights = sum(weight.numel() for weight in self._blank.state_dict().values())
        self.layer_bytes = 4 * num_weights
        self.is_resident = self.layer_bytes * self.architecture.num_layers <= memory_bytes // 2
        self.head_layers = self.architecture.vocab_size * self.architecture.hidden_size // num_weights
        self._resident: dict[int, nn.Module] = {}
        self._positions: dict[int, tuple[tuple[torch.Tensor, torch.Tensor], torch.Tensor | None]] = {}

    def weight(self, name: str) -> torch.Tensor:
        """A copy of any weight, fp32."""
        return self.tensors.read(name).to(self.device, torch.float32, copy=True)

    def embed(self, tokens_BT: torch.Tensor) -> torch.Tensor:
        """Input of layer 0. [B, T, D]. Only the rows that are looked up are read."""
        return self.tensors.read("model.embed_tokens.weight")[tokens_BT].to(self.device, torch.float32)

    def final_norm(self) -> nn.Module:
        """A copy of the norm after the last layer."""
        norm: nn.Module = copy.deepcopy(self._norm)
        return norm

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
        module.load_state_dict({name: self.weight(f"model.layers.{layer_idx}.{name}") for name in names}, assign=True)
        if self.is_resident:
            self._resident[layer_idx] = module
        return module

    def cut_layer(self, plan: LayerPlan, importance: Importance, *, compensation: Compensation) -> nn.Module:
        """The layer of `plan`, sliced, with the mean of what it lost as biases: what a materialized subnet computes."""
        biases: dict[str, torch.Tensor] = {}
        for name, mean_LI, kept_I in (
            (WRITERS[0], importance.o_mean_LQ, _channels(plan.query_heads, self.architecture.head_dim)),
            (WRITERS[1], importance.down_mean_LF, torch.tensor(plan.ffn, dtype=torch.int64)),
        ):
            w_OI = self._source(plan.source_layer, f"{name}.weight")
            if has_compensation(compensation, kept=len(kept_I), whole=w_OI.shape[1]):
                removed_mean_I = torch.tensor(mean_LI[plan.source_layer], dtype=torch.float64)
                removed_mean_I[kept_I] = 0.0
                biases[name] = (w_OI.double() @ removed_mean_I).float()
        return self.sliced_layer(plan, biases)

    def sliced_layer(
        self, plan: LayerPlan, biases: Mapping[str, torch.Tensor] = NO_BIASES, *, replace: bool = False
    ) -> nn.Module:
        """The layer of `plan` with the kept rows and columns of its weights.

        A block without heads, or without neurons, computes its output bias, or nothing.

        Args:
            plan: What it keeps.
            biases: By writer [D]: added to its bias, or instead of it (`replace`).
            replace: See there.
        """
        arch = self.architecture
        module: Any = copy.deepcopy(self._blank)
        query_I = _channels(plan.query_heads, arch.head_dim)
        kv_I = _channels(plan.kv_heads, arch.head_dim)
        ffn_I = torch.tensor(plan.ffn, dtype=torch.int64)
        rows = {"q_proj": query_I, "k_proj": kv_I, "v_proj": kv_I, "gate_proj": ffn_I, "up_proj": ffn_I}
        columns = {"o_proj": query_I, "down_proj": ffn_I}
        weights: dict[str, torch.Tensor] = {}
        for name in self._blank.state_dict():
            weight, projection = self._source(plan.source_layer, name), name.split(".")[1]
            if projection in rows:
                weight = weight[rows[projection].to(weight.device)]
            elif projection in columns and weight.dim() == 2:
                weight = weight[:, columns[projection].to(weight.device)]
            weights[name] = weight
        for name, bias_D in biases.items():
            own_D = None if replace else weights.get(f"{name}.bias")
            weights[f"{name}.bias"] = bias_D.to(self.device) if own_D is None else own_D + bias_D
        for name, weight in weights.items():
            owner, _, kind = name.rpartition(".")
            setattr(module.get_submodule(owner), kind, nn.Parameter(weight, requires_grad=False))
        if plan.query_heads:
            module.self_attn.num_key_value_groups = len(plan.query_heads) // len(plan.kv_heads)
        else:
            module.self_attn = _NoAttention(weights.get("self_attn.o_proj.bias"))
        return cast(nn.Module, module)

    def writer_input(self, module: nn.Module, writer: str, hidden_BTD: torch.Tensor) -> torch.Tensor:
        """What enters a writer of one layer, o_proj or down_proj, when `hidden_BTD` enters its block. [B, T, C]."""
        block_name, _, name = writer.rpartition(".")
        block = module.get_submodule(block_name)
        linear = block.get_submodule(name)
        setattr(block, name, nn.Identity())
        try:
            return self._block(module, block_name, hidden_BTD)
        finally:
            setattr(block, name, linear)

    def block(self, module: nn.Module, writer: str, hidden_BTD: torch.Tensor) -> torch.Tensor:
        """The residual stream after the block of `writer`. [B, T, D]."""
        return hidden_BTD + self._block(module, writer.rpartition(".")[0], hidden_BTD)

    def _block(self, module: Any, block_name: str, hidden_BTD: torch.Tensor) -> torch.Tensor:
        if block_name == "self_attn":
            embeddings, mask = self._position(hidden_BTD)
            added_BTD, _ = module.self_attn(
                module.input_layernorm(hidden_BTD), attention_mask=mask, position_embeddings=embeddings
            )
        else:
            added_BTD = module.mlp(module.post_attention_layernorm(hidden_BTD))
        assert isinstance(added_BTD, torch.Tensor)
        return added_BTD

    def _source(self, layer_idx: int, name: str) -> torch.Tensor:
        """One weight of a layer in fp32: the resident one, or read now."""
        if layer_idx in self._resident or self.is_resident:
            weight: torch.Tensor = self.layer(layer_idx).state_dict()[name]
            return weight
        return self.weight(f"model.layers.{layer_idx}.{name}")

    def run(self, module: nn.Module, hidden_BTD: torch.Tensor) -> torch.Tensor:
        """The output of one layer. [B, T, D]."""
        embeddings, mask = self._position(hidden_BTD)
        self.work.layer_tokens += hidden_BTD.shape[0] * hidden_BTD.shape[1]
        output: torch.Tensor = module(hidden_BTD, attention_mask=mask, position_embeddings=embeddings)
        return output

    def _position(self, hidden_BTD: torch.Tensor) -> tuple[tuple[torch.Tensor, torch.Tensor], torch.Tensor | None]:
        """Position embeddings and mask for samples of this length."""
        num_tokens = hidden_BTD.shape[1]
        if num_tokens not in self._positions:
            positions = torch.arange(num_tokens, device=self.device)[None]
            self._positions[num_tokens] = (self._rotary(hidden_BTD, positions), self._mask(num_tokens))
        return self._positions[num_tokens]

    def _mask(self, num_tokens: int) -> torch.Tensor | None:
        """None is causal. A sliding window only needs a mask where samples are longer than it."""
        window = self.architecture.sliding_window
        if window is None or num_tokens <= window:
            return None
        return (
            torch.ones(num_tokens, num_tokens, dtype=torch.bool, device=self.device).tril().triu(1 - window)[None, None]
        )


class _NoAttention(nn.Module):
    """An attention block that kept no head: its compensation bias, or nothing."""

    def __init__(self, bias_D: torch.Tensor | None) -> None:
        super().__init__()
        self.bias_D = None if bias_D is None else nn.Parameter(bias_D, requires_grad=False)

    def forward(self, hidden_states: torch.Tensor, **_: Any) -> tuple[torch.Tensor, None]:
        added = torch.zeros_like(hidden_states)
        return (added if self.bias_D is None else added + self.bias_D), None


def _channels(heads: tuple[int, ...], head_dim: int) -> torch.Tensor:
    """Channels of the heads, in order."""
    return (torch.tensor(heads, dtype=torch.int64)[:, None] * head_dim + torch.arange(head_dim)).reshape(-1)
