"""The decoder as a walk over layers, the same for both dialects. One graph serves prefill and decode.

Inputs: `input_ids` [batch, sequence], `attention_mask` [batch, total], `past_key_values.{i}.{key,value}`
[batch, kv_heads, past, head_dim]. Outputs: `logits` [batch, sequence, vocab], `present.{i}.{key,value}`. `i` counts the
layers that have attention; a layer without has no cache.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol

from amoeba_export.formats.onnx.datatype import DataType
from amoeba_export.formats.onnx.graph import Value
from amoeba_export.formats.onnx.names import Names
from amoeba_export.formats.onnx.vocabulary import of_all_tokens
from amoeba_export.formats.onnx.weights import WeightStore
from amoeba_export.ir import Architecture, DenseArchitecture, LayerDims, Role


@dataclass(frozen=True, slots=True)
class Stream:
    """The residual stream: `base`, what the last block added and that block's bias, summed by the norm that follows."""

    base: Value
    added: Value | None = None
    bias: Value | None = None


@dataclass(frozen=True, slots=True)
class LayerCache:
    """The KV cache of one layer, [batch, kv_heads, tokens, head_dim] each."""

    key: Value
    value: Value


class Dialect(Protocol):
    """The operators that a decoder is written in. `layer` is an index; names follow from it."""

    opsets: ClassVar[Mapping[str, int]]
    ir_version: ClassVar[int]

    def embed(self, input_ids: Value) -> Value:
        """Rows of the embedding, scaled as the family does, [batch, sequence, hidden]."""

    def prepare(self, input_ids: Value, attention_mask: Value) -> None:
        """What all attentions share: lengths, masks, positions."""

    def output_bias(self, role: Role, layer: int) -> Value:
        """The bias of the module that writes into the stream."""

    def norm(self, stream: Stream, role: Role, layer: int | None = None) -> tuple[Value, Stream]:
        """RMSNorm of the stream, and the stream with its sum done."""

    def total(self, stream: Stream, name: str) -> Value:
        """The sum of the stream alone."""

    def output_norm(self, x: Value, role: Role, layer: int) -> Value:
        """RMSNorm of what a block made."""

    def add(self, x: Value, bias: Value, name: str) -> Value:
        """A tensor plus a vector."""

    def as_row(self, bias: Value, name: str) -> Value:
        """A vector as a tensor [1, 1, hidden]."""

    def scale(self, x: Value, factor: float, name: str) -> Value:
        """A tensor times a number."""

    def attention(self, layer: int, dims: LayerDims, x: Value, past: LayerCache) -> tuple[Value, LayerCache]:
        """Attention up to and including the product that writes into the stream, without its bias."""

    def mlp(self, layer: int, dims: LayerDims, x: Value) -> Value:
        """The gated FFN likewise."""

    def head(self, x: Value) -> Value:
        """Logits of the rows that the head has."""


def record_decoder(
    dense: DenseArchitecture, names: Names, dialect: Dialect, store: WeightStore, head_tokens: Sequence[int] | None
) -> None:
    """Record the whole graph of `dense`, inputs and outputs included, with logits of `head_tokens` (None: of all)."""
    base, recorder, dtype = dense.base, store.recorder, store.precision.activation
    input_ids = recorder.input("input_ids", DataType.INT64, ("batch", "sequence"))
    attention_mask = recorder.input("attention_mask", DataType.INT64, ("batch", "total"))
    with_attention = [layer for layer in dense.layers if layer.num_heads]
    pasts = [
        LayerCache(
            *(
                recorder.input(
                    f"past_key_values.{i}.{kind}", dtype, ("batch", layer.num_kv_heads, "past", base.head_dim)
                )
                for kind in ("key", "value")
            )
        )
        for i, layer in enumerate(with_attention)
    ]
    dialect.prepare(input_ids, attention_mask)
    blocks = _Blocks(base, names, dialect)
    stream = Stream(dialect.embed(input_ids))
    presents: list[LayerCache] = []
    for i, layer in enumerate(dense.layers):
        made = None
        if layer.num_heads:
            x, stream = blocks.enter(stream, "attn_in_norm", "q", i)
            made, present = dialect.attention(i, layer, x, pasts[len(presents)])
            presents.append(present)
        stream = blocks.leave(stream, made, "o", "attn_out_norm", i, has_bias=layer.o_bias)
        made = None
        if layer.ffn_size:
            x, stream = blocks.enter(stream, "ffn_in_norm", "gate", i)
            made = dialect.mlp(i, layer, x)
        stream = blocks.leave(stream, made, "down", "ffn_out_norm", i, has_bias=layer.down_bias)
    x, _ = dialect.norm(stream, "final_norm")
    logits = of_all_tokens(dialect.head(x), head_tokens, base, names, store)
    recorder.output(logits, "logits", dtype, ("batch", "sequence", base.vocab_size))
    for i, (layer, present) in enumerate(zip(with_attention, presents, strict=True)):
        for kind in ("key", "value"):
            recorder.output(
                getattr(present, kind),
                f"present.{i}.{kind}",
                dtype,
                ("batch", layer.num_kv_heads, "total", base.head_dim),
            )


@dataclass(frozen=True, slots=True)
class _Blocks:
    """What surrounds the blocks of a family: norms before and after them, and the scale of what they add."""

    base: Architecture
    names: Names
    dialect: Dialect

    def enter(self, stream: Stream, norm: Role, reader: Role, layer: int) -> tuple[Value, Stream]:
        """What a block reads, and the stream that it leaves behind."""
        if self.base.input_norms:
            return self.dialect.norm(stream, norm, layer)
        total = self.dialect.total(stream, f"{self.names.block(reader, layer)}/in")
        return total, Stream(total)

    def leave(
        self, stream: Stream, made: Value | None, writer: Role, norm: Role, layer: int, *, has_bias: bool
    ) -> Stream:
        """The stream with what a block made; a block that is gone (None) may have left its bias behind."""
        base, dialect = self.base, self.dialect
        node = self.names.node(writer, layer)
        bias = dialect.output_bias(writer, layer) if has_bias else None
        if made is None:
            return stream if bias is None else self._with_constant(stream, bias, norm, layer, node)
        if not base.output_norms and base.residual_scale == 1.0:
            return Stream(stream.base, made, bias)
        if bias is not None:
            made = dialect.add(made, bias, f"{node}/bias")
        if base.output_norms:
            made = dialect.output_norm(made, norm, layer)
        if base.residual_scale != 1.0:
            made = dialect.scale(made, base.residual_scale, f"{node}/scaled")
        return Stream(stream.base, made)

    def _with_constant(self, stream: Stream, bias: Value, norm: Role, layer: int, node: str) -> Stream:
        """The stream plus what is left of a block that is gone: the norm of its bias."""
        if self.base.output_norms:
            bias = self.dialect.output_norm(self.dialect.as_row(bias, f"{node}/bias_row"), norm, layer)
        if self.base.residual_scale != 1.0:
            bias = self.dialect.scale(bias, self.base.residual_scale, f"{node}/bias_scaled")
        total = stream.base
        for i, term in enumerate((stream.added, stream.bias, bias)):
            if term is not None:
                total = self.dialect.add(total, term, f"{node}/bias/add_{i}")
        return Stream(total)
