"""What a decoder-only transformer is made of before it is cut. `ir/dense.py` has what a cut of it is made of.

Dimension letters used in tensor names across the project: D hidden, F FFN neurons, N query heads, K KV heads, H head
dim, V vocabulary, R LoRA rank, E experts, L layers, T tokens, B batch, O out features, I in features. Q = N * H.

Long on purpose: one list of facts, and what follows from each.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from amoeba_export.ir.dense import Compensation, DenseArchitecture, LayerDims, has_compensation
from amoeba_export.ir.family import (
    Activation,
    Axis,
    LayerKind,
    QkNormScope,
    QueryTemperature,
    Role,
    Rope,
    TensorTemplate,
)
from amoeba_export.reading import decode


@dataclass(frozen=True, slots=True, kw_only=True)
class Architecture:
    """The dims of a supernet, and the facts beside them, that decide shapes, cost and function.

    Layers have the same dims. They may attend in different ways (`kinds`). Defaults are Llama's. One layer computes

        x += residual_scale * attn_out_norm(o(attention(attn_in_norm(x))))
        x += residual_scale * ffn_out_norm(down(activation(gate(h)) * up(h))),  h = ffn_in_norm(x)

    where norms that a family does not have are left out; then logits = head(final_norm(x)) / logits_divisor. With
    experts, the second block adds what the experts of a token give, each times its share (`model/experts.py`).

    Attributes:
        family: Key of `load/architectures/*.toml`, equal to the source's `model_type`.
        rope_theta: Base of RoPE. With several kinds of layers, that of the first kind; ask `layer_kinds`.
        rope_scaling: The source's RoPE parameters other than the base, or None for plain RoPE. Likewise.
        sliding_window: Attention window in tokens that all layers share, else None. Ask `layer_kinds`.
        rotary_dims: Leading dims of each head that RoPE turns; None for all of them.
        ffn_size: Units of the FFN that a cut keeps or drops: neurons, or experts of `expert_size` neurons each.
        expert_size: Neurons of one expert; None for an FFN without experts. Ask `unit_size`.
        experts_per_token: Experts that a token goes through: those that the router scores highest.
        shares_sum_to_one: Whether the shares of a token's experts are divided by their sum.
        head_rows: Tokens that logits are computed of, where they are not all: the head is then a matrix of its own.
        kinds: Where layers attend in different ways or are not rotated, each way once; else empty.
        kind_of_layer: Per layer of the supernet, an index into `kinds`; empty where `kinds` is.
        qk_norm: Whether there are norms of q and k, after the projection and before RoPE.
        qk_norm_scope: What one of them runs over. With `whole`, cutting heads would change the statistic.
        norm_offset: Added to the weight of every norm, q's and k's included: normed * (norm_offset + weight).
        input_norms: Whether there are norms before the blocks (`attn_in_norm`, `ffn_in_norm`).
        output_norms: Whether there are norms after the blocks, before the addition (`attn_out_norm`, `ffn_out_norm`).
        activation: Of the FFN's gate.
        attention_scale: What scores q k are multiplied by; None for head_dim ** -0.5. Ask `score_scale`.
        attention_softcap: Scaled scores s become cap * tanh(s / cap) before the mask; None for no cap.
        query_temperature: By what queries are multiplied, by position; None for nothing.
        embedding_scale: What rows of the embedding are multiplied by, before layer 0. A tied head is not scaled.
        embedding_scale_rounded: Whether that factor is rounded to the dtype in which the model runs.
        residual_scale: What a block's output is multiplied by before it is added to the stream, its bias included.
        logits_divisor: What logits are divided by.
        final_softcap: Logits l become cap * tanh(l / cap), after the division; None for no cap.
        containers: By container, what the family's file says of it.
        config: The source's `config.json` as read, for what we carry over and do not interpret. Lists that have an
            entry per layer are written out where layers differ.
    """

    family: str
    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    ffn_size: int
    vocab_size: int
    max_positions: int
    norm_eps: float
    rope_theta: float
    rope_scaling: Mapping[str, Any] | None = None
    sliding_window: int | None = None
    tied_embeddings: bool = False
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    qk_norm_scope: QkNormScope = "head"
    rotary_dims: int | None = None
    kinds: tuple[LayerKind, ...] = ()
    kind_of_layer: tuple[int, ...] = ()
    norm_offset: float = 0.0
    input_norms: bool = True
    output_norms: bool = False
    activation: Activation = "silu"
    attention_scale: float | None = None
    attention_softcap: float | None = None
    query_temperature: QueryTemperature | None = None
    embedding_scale: float = 1.0
    embedding_scale_rounded: bool = False
    residual_scale: float = 1.0
    logits_divisor: float = 1.0
    final_softcap: float | None = None
    expert_size: int | None = None
    experts_per_token: int = 0
    shares_sum_to_one: bool = False
    head_rows: int | None = None
    containers: Mapping[str, Mapping[str, Any]] = field(default_factory=dict, repr=False, compare=False)
    config: Mapping[str, Any] = field(default_factory=dict, repr=False, compare=False)

    def has(self, template: TensorTemplate) -> bool:
        """Whether this model has a weight of its family."""
        if template.when == "untied":
            return not self.tied_embeddings
        return template.when is None or bool(getattr(self, template.when))

    def with_head(self, rows: int | None) -> Architecture:
        """The same with logits of so many tokens; None for all."""
        return self if rows == self.head_rows else dataclasses.replace(self, head_rows=rows)

    @property
    def embedding_params(self) -> int:
        """Weights of the embedding."""
        return self.vocab_size * self.hidden_size

    @property
    def num_logits(self) -> int:
        """Rows of the head: tokens that logits are computed of."""
        return self.head_rows or self.vocab_size

    @property
    def head_params(self) -> int:
        """Weights that logits are computed with: the head's, or the embedding's where it stands for it."""
        return self.num_logits * self.hidden_size

    @property
    def logits_role(self) -> Role:
        """The role of the weight that logits come from."""
        return "embedding" if self.tied_embeddings else "head"

    @property
    def has_own_head(self) -> bool:
        """Whether the head is a matrix of its own."""
        return not self.tied_embeddings or self.head_rows is not None

    @property
    def layer_kinds(self) -> tuple[LayerKind, ...]:
        """Every way in which layers attend: one for most models."""
        if self.kinds:
            return self.kinds
        rope = Rope(theta=self.rope_theta, scaling=self.rope_scaling, dims=self.rotary_dims or self.head_dim)
        name = "full_attention" if self.sliding_window is None else "sliding_attention"
        return (LayerKind(name=name, window=self.sliding_window, rope=rope),)

    def kind_index(self, source_layer: int) -> int:
        """Index into `layer_kinds` of a layer of the supernet."""
        return self.kind_of_layer[source_layer] if self.kinds else 0

    def kind(self, source_layer: int) -> LayerKind:
        """How a layer of the supernet attends."""
        return self.layer_kinds[self.kind_index(source_layer)]

    @property
    def score_scale(self) -> float:
        """What attention scores are multiplied by."""
        return self.head_dim**-0.5 if self.attention_scale is None else self.attention_scale

    @property
    def cuts_heads(self) -> bool:
        """Whether a cut may drop heads: not where a norm runs over all of them."""
        return not (self.qk_norm and self.qk_norm_scope == "whole")

    def facts(self) -> dict[str, Any]:
        """Dims and facts as JSON values: what `from_facts` reads. Facts that are Llama's are left out."""
        everything = dataclasses.asdict(self)
        del everything["config"], everything["containers"]
        plain = {f.name: f.default for f in dataclasses.fields(self) if f.name in _FACTS}
        return {key: value for key, value in everything.items() if key not in plain or value != plain[key]}

    @classmethod
    def from_facts(cls, facts: Mapping[str, Any]) -> Architecture:
        """Read what `facts` gave. Raises `WrongValue`."""
        return decode(cls, dict(facts), "dims")

    @property
    def heads_per_kv(self) -> int:
        """Query heads that share one KV head."""
        return self.num_heads // self.num_kv_heads

    @property
    def layer_dims(self) -> LayerDims:
        """The dims that every layer of the uncut model has; its kind is the first one's."""
        return LayerDims(
            num_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads,
            ffn_size=self.ffn_size,
            qkv_bias=self.qkv_bias,
            o_bias=self.o_bias,
            gate_up_bias=self.mlp_bias,
            down_bias=self.mlp_bias,
        )

    @property
    def uncut(self) -> DenseArchitecture:
        """The whole model, as dims of a cut one."""
        whole = self.layer_dims
        layers = tuple(dataclasses.replace(whole, kind=self.kind_index(i)) for i in range(self.num_layers))
        return DenseArchitecture(base=self, layers=layers)

    def axis_size(self, axis: Axis, layer: LayerDims | None = None) -> int:
        """Length of `axis` in the full model, or in a cut `layer`."""
        dims = layer or self.layer_dims
        sizes: dict[Axis, int] = {
            "vocab": self.vocab_size,
            "hidden": self.hidden_size,
            "query": dims.num_heads * self.head_dim,
            "kv": dims.num_kv_heads * self.head_dim,
            "ffn": dims.ffn_size * self.unit_size,
            "expert": dims.ffn_size,
            "head_dim": self.head_dim,
        }
        return sizes[axis]

    @property
    def query_head_params(self) -> int:
        """Weights of one query head: its rows of q_proj and its columns of o_proj."""
        return 2 * self.head_dim * self.hidden_size

    @property
    def kv_head_params(self) -> int:
        """Weights of one KV head: its rows of k_proj and v_proj."""
        return 2 * self.head_dim * self.hidden_size

    @property
    def unit_size(self) -> int:
        """Neurons in one unit of the FFN."""
        return self.expert_size or 1

    @property
    def units(self) -> Literal["neurons", "experts"]:
        """What the units of the FFN are, as messages call them."""
        return "experts" if self.expert_size else "neurons"

    @property
    def unit_params(self) -> int:
        """Weights of one unit of the FFN: rows of gate and up, columns of down, and an expert's row of the router."""
        return 3 * self.hidden_size * self.unit_size + (self.hidden_size if self.expert_size else 0)

    def picked_of(self, num_experts: int) -> int:
        """Experts that a token goes through where so many are left."""
        return min(self.experts_per_token, num_experts)

    def active_units(self, ffn_size: int, tokens: float = 1) -> float:
        """Units that `tokens` go through together, of `ffn_size` that are there: all neurons, or the experts picked.

        Tokens are taken to pick experts evenly and apart from each other.
        """
        if not self.expert_size or not ffn_size:
            return ffn_size
        picked = self.picked_of(ffn_size)
        active: float = picked if tokens == 1 else ffn_size * (1 - (1 - picked / ffn_size) ** tokens)
        return active

    def ffn_align(self, align: int) -> int:
        """What the number of kept units is a multiple of, where sizes of matrices are multiples of `align`."""
        return 1 if self.expert_size else align

    def has_down_bias(self, compensation: Compensation, *, kept: int) -> bool:
        """Whether `down` gets a bias for what it lost. Not with experts: what is lost depends on who is picked."""
        return not self.expert_size and has_compensation(compensation, kept=kept, whole=self.ffn_size)

    def cut_layer(
        self,
        num_heads: int,
        num_kv_heads: int,
        ffn_size: int,
        *,
        compensation: Compensation = "removed",
        kind: int = 0,
    ) -> LayerDims:
        """A layer that keeps so many, with the source's biases and those of `compensation`."""
        return LayerDims(
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            ffn_size=ffn_size,
            qkv_bias=self.qkv_bias,
            o_bias=self.o_bias or has_compensation(compensation, kept=num_heads, whole=self.num_heads),
            gate_up_bias=self.mlp_bias,
            down_bias=self.mlp_bias or self.has_down_bias(compensation, kept=ffn_size),
            kind=kind,
        )

    def prunable_params(self, layer: LayerDims | None = None) -> int:
        """Weights of the attention heads and FFN units of one layer. Norms and biases do not count."""
        dims = layer or self.layer_dims
        return (
            dims.num_heads * self.query_head_params
            + dims.num_kv_heads * self.kv_head_params
            + dims.ffn_size * self.unit_params
        )


_FACTS = (
    *("qk_norm_scope", "rotary_dims", "kinds", "kind_of_layer", "norm_offset", "input_norms", "output_norms"),
    *("activation", "attention_scale", "attention_softcap", "query_temperature", "embedding_scale"),
    *("embedding_scale_rounded", "residual_scale", "logits_divisor", "final_softcap"),
    *("expert_size", "experts_per_token", "shares_sum_to_one", "head_rows"),
)
"""Fields that are left out of JSON where they have their default, so that files of Llama's kind stay as they were."""
