"""A Llama-like decoder whose layers may differ in heads, KV heads and FFN size, or have no attention or no FFN at all.

This file travels beside the weights that it runs, and depends on transformers alone (4.57 to 5.x):

    AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)

A block that was removed leaves at most a constant, its output bias. Layers without attention have no KV cache: the
others take the cache's places in order.
"""
# ruff: noqa: D102 - the methods without a docstring are those that every torch and transformers model has
# mypy: ignore-errors
# (every base class here is untyped to us; this file is checked by running it, as the copy beside the weights)

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import GenerationMixin, LlamaConfig, PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import (
    LlamaRMSNorm,
    LlamaRotaryEmbedding,
    apply_rotary_pos_emb,
    eager_attention_forward,
)

CACHE = "cache" if "cache" in inspect.signature(create_causal_mask).parameters else "past_key_values"
"""What this transformers calls the KV cache of a model: it has another name since 5.24."""


class AmoebaConfig(LlamaConfig):
    """Llama's config with one entry per layer for what differs.

    Attributes:
        layer_query_heads, layer_kv_heads, layer_ffn_sizes: Zero heads: no attention. Zero neurons: no FFN.
        layer_o_bias, layer_down_bias: Whether o_proj and down_proj of the layer have a bias.
        qkv_bias, gate_up_bias: Whether q, k and v, and gate and up, have biases (every layer).
        qk_norm: Whether queries and keys are normalised per head (every layer).
    """

    model_type = "amoeba"

    layer_query_heads: list[int] | None = None
    layer_kv_heads: list[int] | None = None
    layer_ffn_sizes: list[int] | None = None
    layer_o_bias: list[bool] | None = None
    layer_down_bias: list[bool] | None = None
    qkv_bias: bool = False
    gate_up_bias: bool = False
    qk_norm: bool = False
    sliding_window: int | None = None
    layer_types: list[str] | None = None

    def validate_architecture(self) -> None:
        """Llama's rule that heads divide the hidden size does not hold here: `head_dim` is explicit."""


class AmoebaAttention(nn.Module):
    """Grouped-query attention with this layer's heads."""

    def __init__(self, config: AmoebaConfig, layer_idx: int, cache_idx: int) -> None:
        super().__init__()
        heads, kv_heads = config.layer_query_heads[layer_idx], config.layer_kv_heads[layer_idx]
        self.config = config
        self.layer_idx = cache_idx
        self.head_dim = config.head_dim
        self.num_key_value_groups = heads // kv_heads
        self.scaling = config.head_dim**-0.5
        self.is_causal = True
        self.q_proj = nn.Linear(config.hidden_size, heads * self.head_dim, bias=config.qkv_bias)
        self.k_proj = nn.Linear(config.hidden_size, kv_heads * self.head_dim, bias=config.qkv_bias)
        self.v_proj = nn.Linear(config.hidden_size, kv_heads * self.head_dim, bias=config.qkv_bias)
        self.o_proj = nn.Linear(heads * self.head_dim, config.hidden_size, bias=config.layer_o_bias[layer_idx])
        if config.qk_norm:
            self.q_norm = LlamaRMSNorm(self.head_dim, eps=config.rms_norm_eps)
            self.k_norm = LlamaRMSNorm(self.head_dim, eps=config.rms_norm_eps)

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | None,
        past_key_values: Cache | None,
        **kwargs: Any,
    ) -> torch.Tensor:
        shape = (*hidden_states.shape[:-1], -1, self.head_dim)
        query, key, value = (
            projection(hidden_states).view(shape) for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        if self.config.qk_norm:
            query, key = self.q_norm(query), self.k_norm(key)
        query, key, value = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
        cos, sin = position_embeddings
        query, key = apply_rotary_pos_emb(query, key, cos, sin)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        attend: Callable = eager_attention_forward
        if self.config._attn_implementation != "eager":
            attend = ALL_ATTENTION_FUNCTIONS[self.config._attn_implementation]
        output, _ = attend(
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=self.config.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            sliding_window=self.config.sliding_window,
            **kwargs,
        )
        return self.o_proj(output.reshape(*hidden_states.shape[:-1], -1))


class AmoebaMLP(nn.Module):
    """Gated FFN with this layer's neurons."""

    def __init__(self, config: AmoebaConfig, layer_idx: int) -> None:
        super().__init__()
        size = config.layer_ffn_sizes[layer_idx]
        self.gate_proj = nn.Linear(config.hidden_size, size, bias=config.gate_up_bias)
        self.up_proj = nn.Linear(config.hidden_size, size, bias=config.gate_up_bias)
        self.down_proj = nn.Linear(size, config.hidden_size, bias=config.layer_down_bias[layer_idx])

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        gate = nn.functional.silu(self.gate_proj(hidden_states))
        return self.down_proj(gate * self.up_proj(hidden_states))


class AmoebaConstant(nn.Module):
    """What is left of a removed block: its output bias, under the name of the projection that it belonged to."""

    def __init__(self, config: AmoebaConfig, projection: str) -> None:
        super().__init__()
        self.projection = projection
        left = nn.Module()
        left.bias = nn.Parameter(torch.zeros(config.hidden_size))
        self.add_module(projection, left)

    def forward(self) -> torch.Tensor:
        return getattr(self, self.projection).bias


class AmoebaDecoderLayer(nn.Module):
    """One layer. Each of its two blocks is whole, a constant, or absent."""

    def __init__(self, config: AmoebaConfig, layer_idx: int, cache_idx: int) -> None:
        super().__init__()
        self.self_attn = self.mlp = None
        if config.layer_query_heads[layer_idx]:
            self.input_layernorm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
            self.self_attn = AmoebaAttention(config, layer_idx, cache_idx)
        elif config.layer_o_bias[layer_idx]:
            self.self_attn = AmoebaConstant(config, "o_proj")
        if config.layer_ffn_sizes[layer_idx]:
            self.post_attention_layernorm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
            self.mlp = AmoebaMLP(config, layer_idx)
        elif config.layer_down_bias[layer_idx]:
            self.mlp = AmoebaConstant(config, "down_proj")

    def forward(self, hidden_states: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        if isinstance(self.self_attn, AmoebaConstant):
            hidden_states = hidden_states + self.self_attn()
        elif self.self_attn is not None:
            hidden_states = hidden_states + self.self_attn(self.input_layernorm(hidden_states), **kwargs)
        if isinstance(self.mlp, AmoebaConstant):
            hidden_states = hidden_states + self.mlp()
        elif self.mlp is not None:
            hidden_states = hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))
        return hidden_states


class AmoebaPreTrainedModel(PreTrainedModel):
    """What transformers asks of every model."""

    config_class = AmoebaConfig
    base_model_prefix = "model"
    _no_split_modules = ["AmoebaDecoderLayer"]  # noqa: RUF012 - transformers' own spelling
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True


class AmoebaModel(AmoebaPreTrainedModel):
    """Embedding, layers and final norm."""

    def __init__(self, config: AmoebaConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        cache_idx = [sum(1 for heads in config.layer_query_heads[:i] if heads) for i in range(config.num_hidden_layers)]
        self.layers = nn.ModuleList(
            AmoebaDecoderLayer(config, layer_idx, cache_idx[layer_idx]) for layer_idx in range(config.num_hidden_layers)
        )
        self.norm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = LlamaRotaryEmbedding(config=config)
        self.post_init()

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        cache: Cache | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        hidden_states = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        past_key_values = cache if past_key_values is None else past_key_values
        if past_key_values is None and (self.config.use_cache if use_cache is None else use_cache):
            past_key_values = DynamicCache(config=self.config)
        seen = past_key_values.get_seq_length() if past_key_values is not None else 0
        positions = torch.arange(seen, seen + hidden_states.shape[1], device=hidden_states.device)
        if position_ids is None:
            position_ids = positions.unsqueeze(0)
        mask = self._mask(hidden_states, attention_mask, past_key_values, position_ids, positions)
        position_embeddings = self.rotary_emb(hidden_states, position_ids)
        for name in ("cache_position", "return_dict", "output_attentions", "labels"):
            kwargs.pop(name, None)
        states = [hidden_states]
        for layer in self.layers:
            hidden_states = layer(
                hidden_states,
                position_embeddings=position_embeddings,
                attention_mask=mask,
                past_key_values=past_key_values,
                **kwargs,
            )
            states.append(hidden_states)
        hidden_states = self.norm(hidden_states)
        return BaseModelOutputWithPast(
            last_hidden_state=hidden_states,
            hidden_states=(*states[:-1], hidden_states) if output_hidden_states else None,
            **{CACHE: past_key_values},
        )

    def _mask(
        self,
        inputs_embeds: torch.Tensor,
        attention_mask: torch.Tensor | None,
        past_key_values: Cache | None,
        position_ids: torch.Tensor,
        cache_position: torch.Tensor,
    ) -> torch.Tensor | None:
        """The mask of every layer. transformers renames the arguments now and then; each version is given its own."""
        create = create_causal_mask if self.config.sliding_window is None else create_sliding_window_causal_mask
        known = {
            "config": self.config,
            "inputs_embeds": inputs_embeds,
            "input_embeds": inputs_embeds,
            "attention_mask": attention_mask,
            "cache_position": cache_position,
            "past_key_values": past_key_values,
            "cache": past_key_values,
            "position_ids": position_ids,
        }
        wanted = inspect.signature(create).parameters
        return create(**{name: value for name, value in known.items() if name in wanted})


class AmoebaForCausalLM(AmoebaPreTrainedModel, GenerationMixin):
    """The model with its language modelling head."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: AmoebaConfig) -> None:
        super().__init__(config)
        self.model = AmoebaModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        cache: Cache | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=cache if past_key_values is None else past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept, :])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.vocab_size)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            **{CACHE: outputs.get(CACHE)},
        )
