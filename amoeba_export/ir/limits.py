"""What a runtime loads, as rules on shapes: the `[limits]` of a target file."""

from __future__ import annotations

import math
from dataclasses import dataclass

from amoeba_export.ir.architecture import Architecture
from amoeba_export.ir.dense import DenseArchitecture
from amoeba_export.shown import an


@dataclass(frozen=True, slots=True, kw_only=True)
class RuntimeLimits:
    """Rules that a cut has to keep for a target's runtime to load it.

    Attributes:
        runtime: Name of the runtime, for messages.
        ffn_multiple: The FFN size must be a multiple of this.
        query_multiple: Query heads times head dim must be a multiple of this.
        hidden_multiple: The hidden size must be a multiple of this. A cut does not change it.
        multiples_of: Precisions that these multiples apply to. Empty: all.
        hidden_by_heads: The hidden size must be a multiple of each layer's query heads.
        output_biases: Families for which the runtime computes biases on o_proj and down_proj. Default: all. A cut of
            another family has no such bias.
        uniform: All layers must have the same dims.
    """

    runtime: str = ""
    ffn_multiple: int = 1
    query_multiple: int = 1
    hidden_multiple: int = 1
    multiples_of: tuple[str, ...] = ()
    hidden_by_heads: bool = False
    output_biases: tuple[str, ...] | None = None
    uniform: bool = False

    def problems(self, dense: DenseArchitecture, dtype: str | None = None) -> list[str]:
        """Each rule that `dense` breaks, in words; every one once."""
        base, found = dense.base, []
        if self._has_multiples(dtype) and base.hidden_size % self.hidden_multiple:
            found.append(f"a hidden size of {base.hidden_size} is no multiple of {self.hidden_multiple}")
        for layer in dict.fromkeys(dense.layers):
            query = layer.num_heads * base.head_dim
            if self._has_multiples(dtype) and layer.ffn_size % self.ffn_multiple:
                found.append(f"an FFN of {layer.ffn_size} is no multiple of {self.ffn_multiple}")
            if self._has_multiples(dtype) and query % self.query_multiple:
                heads = f"{layer.num_heads} heads of {base.head_dim}"
                found.append(f"{heads} are no multiple of {self.query_multiple}")
            if self.hidden_by_heads and layer.num_heads and base.hidden_size % layer.num_heads:
                found.append(f"a hidden size of {base.hidden_size} is no multiple of {layer.num_heads} heads")
            if not self.takes_output_biases(base.family) and (layer.o_bias or layer.down_bias):
                found.append(f"biases on o_proj or down_proj of {an(base.family)} are not computed")
        if self.uniform and len({(one.num_heads, one.num_kv_heads, one.ffn_size) for one in dense.layers}) > 1:
            found.append("layers differ in their dims")
        return list(dict.fromkeys(found))

    def in_words(self) -> list[str]:
        """Each rule, for a reader."""
        only = f" in {' and '.join(self.multiples_of)}" if self.multiples_of else ""
        words = []
        if self.ffn_multiple > 1:
            words.append(f"FFN a multiple of {self.ffn_multiple}{only}")
        if self.query_multiple > 1:
            words.append(f"heads x head dim a multiple of {self.query_multiple}{only}")
        if self.hidden_multiple > 1:
            words.append(f"hidden size a multiple of {self.hidden_multiple}{only}")
        if self.hidden_by_heads:
            words.append("hidden size a multiple of the heads")
        if self.output_biases is not None:
            families = ", ".join(self.output_biases)
            where = f"biases on o_proj and down_proj in {families} only" if families else "no bias on o_proj, down_proj"
            words.append(f"{where} (cuts of {'others' if families else 'all families'} are not compensated)")
        if self.uniform:
            words.append("all layers alike")
        return words

    def takes_output_biases(self, family: str) -> bool:
        """Whether a cut of a model of `family` may be compensated."""
        return self.output_biases is None or family in self.output_biases

    def ffn_align(self, dtype: str | None) -> int:
        """What FFN sizes are multiples of in a precision."""
        return self.ffn_multiple if self._has_multiples(dtype) else 1

    def head_multiple(self, architecture: Architecture, dtype: str | None) -> int:
        """What numbers of query heads are multiples of in a precision."""
        if not self._has_multiples(dtype):
            return 1
        return self.query_multiple // math.gcd(self.query_multiple, architecture.head_dim)

    def _has_multiples(self, dtype: str | None) -> bool:
        return not self.multiples_of or dtype in self.multiples_of


NO_LIMITS = RuntimeLimits()


@dataclass(frozen=True, slots=True, kw_only=True)
class ContainerLimits:
    """What cuts of one model have to keep for a container to hold them, as far as a choice of cuts can see to it.

    Attributes:
        container: As messages call it.
        output_biases: Whether what writes into the residual stream may have a bias.
        whole_heads: Whether all heads stay.
        unrotated_every: The layers without RoPE are the last of each so many; 0 for any order.
    """

    container: str
    output_biases: bool = True
    whole_heads: bool = False
    unrotated_every: int = 0
