"""What a decoder-only transformer is made of, before and after cutting.

Dimension letters used in tensor names across the project: D hidden, F FFN neurons, N query heads, K KV heads, H head
dim, V vocabulary, R LoRA rank, E experts, L layers, T tokens, B batch, O out features, I in features. Q = N * H.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Axis = Literal["vocab", "hidden", "query", "kv", "ffn", "head_dim"]
"""What one axis of a weight indexes. `query` is N * H long, `kv` is K * H long."""


Compensation = Literal["none", "removed", "all"]
"""Which blocks of a cut have a bias for what they lost: none, those that lost heads or neurons, or all of them, as an
upstream strategy lists them."""


def has_compensation(compensation: Compensation, *, kept: int, whole: int) -> bool:
    """Whether a block that keeps so many of its heads or neurons gets a bias besides the source's own."""
    return compensation == "all" or (compensation == "removed" and kept < whole)


@dataclass(frozen=True, slots=True, kw_only=True)
class Architecture:
    """The dimensions of a supernet that decide shapes, cost and function. One family, every layer alike.

    Attributes:
        family: Key of `load/architectures/*.toml`, equal to the source's `model_type`.
        rope_scaling: The source's RoPE parameters other than the base, or None for plain RoPE.
        sliding_window: Attention window in tokens, or None when every layer attends to everything.
        config: The source's `config.json` as read, for what we carry over and do not interpret.
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
    config: Mapping[str, Any] = field(default_factory=dict, repr=False, compare=False)

    @property
    def heads_per_kv(self) -> int:
        """Query heads that share one KV head."""
        return self.num_heads // self.num_kv_heads

    @property
    def layer_dims(self) -> LayerDims:
        """The dims that every layer of the uncut model has."""
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
        return DenseArchitecture(base=self, layers=(self.layer_dims,) * self.num_layers)

    def axis_size(self, axis: Axis, layer: LayerDims | None = None) -> int:
        """Length of `axis` in the full model, or in a cut `layer`."""
        dims = layer or self.layer_dims
        sizes: dict[Axis, int] = {
            "vocab": self.vocab_size,
            "hidden": self.hidden_size,
            "query": dims.num_heads * self.head_dim,
            "kv": dims.num_kv_heads * self.head_dim,
            "ffn": dims.ffn_size,
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
    def neuron_params(self) -> int:
        """Weights of one FFN neuron: a row of gate and of up, a column of down."""
        return 3 * self.hidden_size

    def cut_layer(
        self, num_heads: int, num_kv_heads: int, ffn_size: int, *, compensation: Compensation = "removed"
    ) -> LayerDims:
        """A layer that keeps so many, with the source's biases and those of `compensation`."""
        return LayerDims(
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            ffn_size=ffn_size,
            qkv_bias=self.qkv_bias,
            o_bias=self.o_bias or has_compensation(compensation, kept=num_heads, whole=self.num_heads),
            gate_up_bias=self.mlp_bias,
            down_bias=self.mlp_bias or has_compensation(compensation, kept=ffn_size, whole=self.ffn_size),
        )

    def prunable_params(self, layer: LayerDims | None = None) -> int:
        """Weights of the attention heads and FFN neurons of one layer. Norms and biases do not count."""
        dims = layer or self.layer_dims
        return (
            dims.num_heads * self.query_head_params
            + dims.num_kv_heads * self.kv_head_params
            + dims.ffn_size * self.neuron_params
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerDims:
    """The dims of one layer. Zero heads: no attention and no KV cache. Zero neurons: no FFN."""

    num_heads: int
    num_kv_heads: int
    ffn_size: int
    qkv_bias: bool = False
    o_bias: bool = False
    gate_up_bias: bool = False
    down_bias: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class DenseArchitecture:
    """The dims of a cut model: what a format writer, a cost model and a backend need to know.

    Attributes:
        base: The supernet's dims; its hidden size, head dim, vocabulary and RoPE hold for the cut model too.
        layers: One entry per kept layer, in order.
    """

    base: Architecture
    layers: tuple[LayerDims, ...]

    @property
    def is_uniform(self) -> bool:
        """True when every layer has the same dims and the same biases."""
        return len(set(self.layers)) <= 1

    @property
    def num_params(self) -> int:
        """Weights of the cut model, embeddings (counted once when tied), norms and biases included."""
        base = self.base
        embeddings = base.vocab_size * base.hidden_size * (1 if base.tied_embeddings else 2)
        return embeddings + base.hidden_size + sum(self._layer_params(layer) for layer in self.layers)

    def _layer_params(self, layer: LayerDims) -> int:
        """Weights of one layer. A block that is gone takes its norm with it; its output bias may stay."""
        base = self.base
        params = base.prunable_params(layer) + (layer.o_bias + layer.down_bias) * base.hidden_size
        if layer.num_heads:
            params += base.hidden_size + (2 * base.head_dim if base.qk_norm else 0)
            params += layer.qkv_bias * (layer.num_heads + 2 * layer.num_kv_heads) * base.head_dim
        if layer.ffn_size:
            params += base.hidden_size + layer.gate_up_bias * 2 * layer.ffn_size
        return params
