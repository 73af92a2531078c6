"""What a cut of a decoder-only transformer is made of: dims, layer by layer."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from amoeba_export.ir.family import LayerKind

if TYPE_CHECKING:
    from amoeba_export.ir.architecture import Architecture

Compensation = Literal["none", "removed", "all"]
"""Which blocks of a cut have a bias for what they lost: none, those that lost heads or neurons, or all of them, as an
upstream strategy lists them."""


def has_compensation(compensation: Compensation, *, kept: int, whole: int) -> bool:
    """Whether a block that keeps so many of its heads or neurons gets a bias besides the source's own."""
    return compensation == "all" or (compensation == "removed" and kept < whole)


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerDims:
    """The dims of one layer. Zero heads: no attention and no KV cache. Zero units of the FFN: no FFN.

    Attributes:
        kind: How it attends: an index into `Architecture.layer_kinds`.
    """

    num_heads: int
    num_kv_heads: int
    ffn_size: int
    qkv_bias: bool = False
    o_bias: bool = False
    gate_up_bias: bool = False
    down_bias: bool = False
    kind: int = 0


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
        """True when every layer has the same dims and the same biases, however it attends."""
        return len({dataclasses.replace(layer, kind=0) for layer in self.layers}) <= 1

    @property
    def has_whole_layers(self) -> bool:
        """True when no layer lost or gained anything: a cut in depth at most."""
        whole = self.base.layer_dims
        return all(dataclasses.replace(layer, kind=0) == whole for layer in self.layers)

    def kind(self, layer: LayerDims) -> LayerKind:
        """How one of `layers` attends."""
        return self.base.layer_kinds[layer.kind]

    @property
    def num_params(self) -> int:
        """Weights of the cut model, embeddings (counted once when tied), norms and biases included."""
        base = self.base
        embeddings = base.embedding_params + (base.head_params if base.has_own_head else 0)
        return embeddings + base.hidden_size + sum(self.layer_params(layer) for layer in self.layers)

    def layer_params(self, layer: LayerDims) -> int:
        """Weights of one layer. A block that is gone takes its norm with it; its output bias may stay."""
        base = self.base
        params = base.prunable_params(layer) + (layer.o_bias + layer.down_bias) * base.hidden_size
        norms_D = base.input_norms + base.output_norms
        if layer.num_heads:
            params += norms_D * base.hidden_size + self._qk_norm_params(layer)
            params += layer.qkv_bias * (layer.num_heads + 2 * layer.num_kv_heads) * base.head_dim
        elif layer.o_bias:
            params += base.output_norms * base.hidden_size
        if layer.ffn_size:
            params += norms_D * base.hidden_size + layer.gate_up_bias * 2 * layer.ffn_size
        elif layer.down_bias:
            params += base.output_norms * base.hidden_size
        return params

    def _qk_norm_params(self, layer: LayerDims) -> int:
        if not self.base.qk_norm:
            return 0
        heads = layer.num_heads + layer.num_kv_heads if self.base.qk_norm_scope == "whole" else 2
        return heads * self.base.head_dim
