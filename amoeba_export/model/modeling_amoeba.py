"""A decoder whose layers may differ in heads, KV heads and FFN size, or have no attention or no FFN at all.

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
        qk_norm: Whether queries and keys are normalised (every layer), over what `qk_norm_scope` says: head or whole.
        rotary_dims: Leading dims of each head that RoPE turns; None for all.
        norm_offset: Added to the weight of every norm.
        input_norms, output_norms: Whether there are norms before and after each block.
        activation: `silu` or `gelu_tanh`.
        attention_scale: Of scores; None for head_dim ** -0.5. `attention_softcap` bounds them.
        query_temperature: `beta` and `length`: queries times 1 + beta * ln(1 + floor(position / length)).
        embedding_scale, residual_scale, logits_divisor, final_softcap: Of embeddings, blocks, logits.
        expert_size: Neurons of one expert, where a layer's neurons are those of experts; None: they are not.
        experts_per_token, shares_sum_to_one: How many a router picks; whether their shares are scaled to sum to 1.
        layer_kinds, layer_kind: `window`, `rope` (None: none) and `rotary_dims` of each kind; the kind of each layer.
        layer_types: By place in the cache: layers without attention come last.
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
    qk_norm_scope: str = "head"
    rotary_dims: int | None = None
    norm_offset: float = 0.0
    input_norms: bool = True
    output_norms: bool = False
    activation: str = "silu"
    attention_scale: float | None = None
    attention_softcap: float | None = None
    query_temperature: dict[str, Any] | None = None
    embedding_scale: float = 1.0
    residual_scale: float = 1.0
    logits_divisor: float = 1.0
    final_softcap: float | None = None
    expert_size: int | None = None
    experts_per_token: int = 0
    shares_sum_to_one: bool = False
    layer_kinds: list[dict[str, Any]] | None = None
    layer_kind: list[int] | None = None

    def kind(self, layer_idx: int) -> dict[str, Any]:
        """Window and RoPE of a layer."""
        if self.layer_kinds:
            return self.layer_kinds[self.layer_kind[layer_idx]]
        return {"window": self.sliding_window, "rope": "shared"}

    def validate_architecture(self) -> None:
        """Llama's rule that heads divide the hidden size does not hold here: `head_dim` is explicit."""


class AmoebaNorm(nn.Module):
    """A root-mean-square norm that multiplies by offset + weight."""

    def __init__(self, size: int, eps: float, offset: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(size))
        self.eps, self.offset = eps, offset

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        wide = hidden_states.float()
        normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        return (normed * (self.offset + self.weight.float())).type_as(hidden_states)


def norm_of(config: AmoebaConfig, size: int) -> nn.Module:
    """A norm of this model."""
    if config.norm_offset:
        return AmoebaNorm(size, config.rms_norm_eps, config.norm_offset)
    return LlamaRMSNorm(size, eps=config.rms_norm_eps)


def rotary_of(config: AmoebaConfig, rope: dict[str, Any], dims: int) -> nn.Module:
    """Angles of one RoPE over `dims` of a head."""
    scaling = {key: value for key, value in rope.items() if key != "rope_theta"}
    own = LlamaConfig(
        hidden_size=dims,
        num_attention_heads=1,
        head_dim=dims,
        max_position_embeddings=config.max_position_embeddings,
        rope_theta=rope["rope_theta"],
        rope_scaling=None if scaling.get("rope_type", "default") == "default" else scaling,
        rope_parameters=dict(rope),
    )
    return LlamaRotaryEmbedding(config=own)


class AmoebaRotary(nn.Module):
    """Angles of each layer type that has a RoPE of its own."""

    def __init__(self, config: AmoebaConfig) -> None:
        super().__init__()
        self.by_type = nn.ModuleDict(
            {
                "full_attention" if kind["window"] is None else "sliding_attention": rotary_of(
                    config, kind["rope"], kind["rotary_dims"]
                )
                for kind in config.layer_kinds
                if kind["rope"] is not None
            }
        )

    def forward(
        self, x: torch.Tensor, position_ids: torch.Tensor, layer_type: str
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return self.by_type[layer_type](x, position_ids)


def attend_capped(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    softcap: float,
) -> torch.Tensor:
    """Attention with scores bounded by a soft cap. [B, T, N, H]."""
    key, value = (x.repeat_interleave(module.num_key_value_groups, dim=1) for x in (key, value))
    scores = softcap * torch.tanh(query @ key.transpose(2, 3) * scaling / softcap)
    if attention_mask is None:
        num_queries, num_keys = scores.shape[-2:]
        seen = torch.ones(num_queries, num_keys, dtype=torch.bool, device=scores.device)
        attention_mask = seen.tril(num_keys - num_queries)
    if attention_mask.dtype is torch.bool:
        scores = scores.masked_fill(~attention_mask, torch.finfo(scores.dtype).min)
    else:
        scores = scores + attention_mask[..., : scores.shape[-1]]
    shares = torch.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    return (shares @ value).transpose(1, 2)


class AmoebaAttention(nn.Module):
    """Grouped-query attention with this layer's heads."""

    def __init__(self, config: AmoebaConfig, layer_idx: int, cache_idx: int) -> None:
        super().__init__()
        heads, kv_heads = config.layer_query_heads[layer_idx], config.layer_kv_heads[layer_idx]
        self.config = config
        self.layer_idx = cache_idx
        self.head_dim = config.head_dim
        self.num_key_value_groups = heads // kv_heads
        self.scaling = config.head_dim**-0.5 if config.attention_scale is None else config.attention_scale
        self.sliding_window = config.kind(layer_idx)["window"]
        self.is_causal = True
        self.q_proj = nn.Linear(config.hidden_size, heads * self.head_dim, bias=config.qkv_bias)
        self.k_proj = nn.Linear(config.hidden_size, kv_heads * self.head_dim, bias=config.qkv_bias)
        self.v_proj = nn.Linear(config.hidden_size, kv_heads * self.head_dim, bias=config.qkv_bias)
        self.o_proj = nn.Linear(heads * self.head_dim, config.hidden_size, bias=config.layer_o_bias[layer_idx])
        if config.qk_norm:
            whole = config.qk_norm_scope == "whole"
            self.q_norm = norm_of(config, self.head_dim * (heads if whole else 1))
            self.k_norm = norm_of(config, self.head_dim * (kv_heads if whole else 1))

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None,
        attention_mask: torch.Tensor | None,
        past_key_values: Cache | None,
        query_scale: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        shape, config = (*hidden_states.shape[:-1], -1, self.head_dim), self.config
        query, key, value = (projection(hidden_states) for projection in (self.q_proj, self.k_proj, self.v_proj))
        if config.qk_norm and config.qk_norm_scope == "whole":
            query, key = self.q_norm(query), self.k_norm(key)
        query, key, value = (x.view(shape) for x in (query, key, value))
        if config.qk_norm and config.qk_norm_scope == "head":
            query, key = self.q_norm(query), self.k_norm(key)
        query, key, value = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
        if position_embeddings is not None:
            cos, sin = position_embeddings
            dims = cos.shape[-1]
            turned = apply_rotary_pos_emb(query[..., :dims], key[..., :dims], cos, sin)
            query, key = (
                x if dims == self.head_dim else torch.cat([x, whole[..., dims:]], dim=-1)
                for x, whole in zip(turned, (query, key), strict=True)
            )
        if query_scale is not None:
            query = query * query_scale[:, None, :, None].to(query.dtype)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        if config.attention_softcap is not None:
            output = attend_capped(self, query, key, value, attention_mask, self.scaling, config.attention_softcap)
            return self.o_proj(output.reshape(*hidden_states.shape[:-1], -1))
        attend: Callable = eager_attention_forward
        if config._attn_implementation != "eager":
            attend = ALL_ATTENTION_FUNCTIONS[config._attn_implementation]
        output, _ = attend(
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=config.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            sliding_window=self.sliding_window,
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

        self.activation = config.activation

    def activated(self, gate: torch.Tensor) -> torch.Tensor:
        return nn.functional.silu(gate) if self.activation == "silu" else nn.functional.gelu(gate, approximate="tanh")

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.activated(self.gate_proj(hidden_states)) * self.up_proj(hidden_states))


class AmoebaExperts(AmoebaMLP):
    """The neurons of this layer's experts, one expert after the other, and the router that picks some of them."""

    def __init__(self, config: AmoebaConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        self.expert_size = config.expert_size
        self.num_experts = config.layer_ffn_sizes[layer_idx] // config.expert_size
        self.num_picked = min(config.experts_per_token, self.num_experts)
        self.sum_to_one = config.shares_sum_to_one
        self.gate = nn.Linear(config.hidden_size, self.num_experts, bias=False)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        tokens = hidden_states.reshape(-1, hidden_states.shape[-1])
        shares = torch.softmax(self.gate(tokens), dim=-1, dtype=torch.float32)
        shares, picked = shares.topk(self.num_picked, dim=-1)
        if self.sum_to_one:
            shares = shares / shares.sum(dim=-1, keepdim=True)
        shares = shares.to(tokens.dtype)
        output = torch.zeros_like(tokens)
        for expert in picked.unique().tolist():
            rows, ranks = (picked == expert).nonzero(as_tuple=True)
            own = slice(expert * self.expert_size, (expert + 1) * self.expert_size)
            gate = self.activated(nn.functional.linear(tokens[rows], self.gate_proj.weight[own]))
            inner = gate * nn.functional.linear(tokens[rows], self.up_proj.weight[own])
            given = nn.functional.linear(inner, self.down_proj.weight[:, own])
            output.index_add_(0, rows, given * shares[rows, ranks, None])
        return output.view_as(hidden_states)


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
        self.residual_scale = config.residual_scale
        before_ffn = "pre_feedforward_layernorm" if config.output_norms else "post_attention_layernorm"
        if config.layer_query_heads[layer_idx]:
            self.self_attn = AmoebaAttention(config, layer_idx, cache_idx)
        elif config.layer_o_bias[layer_idx]:
            self.self_attn = AmoebaConstant(config, "o_proj")
        if config.layer_ffn_sizes[layer_idx]:
            self.mlp = (AmoebaExperts if config.expert_size else AmoebaMLP)(config, layer_idx)
        elif config.layer_down_bias[layer_idx]:
            self.mlp = AmoebaConstant(config, "down_proj")
        self.norms = []  # names: before attention, after it, before the FFN, after it
        for block, before, after in (
            (self.self_attn, "input_layernorm", "post_attention_layernorm"),
            (self.mlp, before_ffn, "post_feedforward_layernorm"),
        ):
            has_before = config.input_norms and block is not None and not isinstance(block, AmoebaConstant)
            has_after = config.output_norms and block is not None
            for name, is_there in ((before, has_before), (after, has_after)):
                self.norms.append(name if is_there else None)
                if is_there:
                    setattr(self, name, norm_of(config, config.hidden_size))

    def forward(self, hidden_states: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        for block, before, after, settings in (
            (self.self_attn, *self.norms[:2], kwargs),
            (self.mlp, *self.norms[2:], {}),
        ):
            if block is None:
                continue
            if isinstance(block, AmoebaConstant):
                added = block()
            else:
                added = block(hidden_states if before is None else getattr(self, before)(hidden_states), **settings)
            if after is not None:
                added = getattr(self, after)(added)
            hidden_states = hidden_states + (added if self.residual_scale == 1.0 else added * self.residual_scale)
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
        self.norm = norm_of(config, config.hidden_size)
        ropes = [(kind["rope"], kind["rotary_dims"]) for kind in config.layer_kinds or () if kind["rope"] is not None]
        if any(rope != ropes[0] for rope in ropes):
            self.rotary_emb = AmoebaRotary(config)
        elif ropes:
            self.rotary_emb = rotary_of(config, *ropes[0])
        elif config.rotary_dims is not None:
            self.rotary_emb = rotary_of(config, config.rope_parameters, config.rotary_dims)
        else:
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
        if self.config.embedding_scale != 1.0 and inputs_embeds is None:
            scale = torch.tensor(self.config.embedding_scale, dtype=hidden_states.dtype, device=hidden_states.device)
            hidden_states = hidden_states * scale
        masks = {}
        for window in {self.config.kind(i)["window"] for i in range(len(self.layers))}:
            masks[window] = self._mask(window, hidden_states, attention_mask, past_key_values, position_ids, positions)
        angles = self._angles(hidden_states, position_ids)
        query_scale = None
        if (temperature := self.config.query_temperature) is not None:
            query_scale = 1 + temperature["beta"] * torch.log(1 + torch.floor(position_ids / temperature["length"]))
        for name in ("cache_position", "return_dict", "output_attentions", "labels"):
            kwargs.pop(name, None)
        states = [hidden_states]
        for layer_idx, layer in enumerate(self.layers):
            kind = self.config.kind(layer_idx)
            layer_type = "full_attention" if kind["window"] is None else "sliding_attention"
            hidden_states = layer(
                hidden_states,
                position_embeddings=None if kind["rope"] is None else angles[layer_type],
                attention_mask=masks[kind["window"]],
                past_key_values=past_key_values,
                query_scale=query_scale,
                **kwargs,
            )
            states.append(hidden_states)
        hidden_states = self.norm(hidden_states)
        return BaseModelOutputWithPast(
            last_hidden_state=hidden_states,
            hidden_states=(*states[:-1], hidden_states) if output_hidden_states else None,
            **{CACHE: past_key_values},
        )

    def _angles(self, hidden_states: torch.Tensor, position_ids: torch.Tensor) -> dict[str, Any]:
        """Cosines and sines of each layer type that has RoPE."""
        if isinstance(self.rotary_emb, AmoebaRotary):
            return {name: self.rotary_emb(hidden_states, position_ids, name) for name in self.rotary_emb.by_type}
        return dict.fromkeys(("full_attention", "sliding_attention"), self.rotary_emb(hidden_states, position_ids))

    def _mask(
        self,
        window: int | None,
        inputs_embeds: torch.Tensor,
        attention_mask: torch.Tensor | None,
        past_key_values: Cache | None,
        position_ids: torch.Tensor,
        cache_position: torch.Tensor,
    ) -> torch.Tensor | None:
        """The mask of layers with this window. transformers renames arguments at times: each version gets its own."""
        create = create_causal_mask if window is None else create_sliding_window_causal_mask
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
        if self.config.logits_divisor != 1.0:
            logits = logits / self.config.logits_divisor
        if (cap := self.config.final_softcap) is not None:
            logits = cap * torch.tanh(logits / cap)
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.vocab_size)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            **{CACHE: outputs.get(CACHE)},
        )
