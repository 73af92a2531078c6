"""The decoder as a walk over layers, the same for both dialects. One graph serves prefill and decode.

Inputs: `input_ids` [batch, sequence], `attention_mask` [batch, total], `past_key_values.{i}.{key,value}`
[batch, kv_heads, past, head_dim]. Outputs: `logits` [batch, sequence, vocab], `present.{i}.{key,value}`. `i` counts the
layers that have attention; a layer without has no cache.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Protocol

from amoeba_export.formats.onnx.datatype import DataType
from amoeba_export.formats.onnx.graph import Recorder, Value
from amoeba_export.ir import DenseArchitecture, LayerDims


@dataclass(frozen=True, slots=True)
class Stream:
    """The residual stream: `base`, what the last block added and that block's bias, summed by the norm that follows."""

    base: Value
    added: Value | None = None
    bias: Value | None = None


@dataclass(frozen=True, slots=True)
class Cache:
    """The KV cache of one layer, [batch, kv_heads, tokens, head_dim] each."""

    key: Value
    value: Value


class Dialect(Protocol):
    """The operators that a decoder is written in. `layer` is an index; names follow from it."""

    opsets: ClassVar[Mapping[str, int]]
    ir_version: ClassVar[int]

    def embed(self, input_ids: Value) -> Value:
        """Rows of the embedding, [batch, sequence, hidden]."""

    def prepare(self, input_ids: Value, attention_mask: Value) -> None:
        """What all attentions share: lengths, masks, positions."""

    def output_bias(self, name: str) -> Value:
        """The bias of o_proj or down_proj."""

    def norm(self, stream: Stream, name: str) -> tuple[Value, Stream]:
        """RMSNorm of the stream with the weight `name`, and the stream with its sum done."""

    def add_constant(self, stream: Stream, bias: Value, name: str) -> Stream:
        """The stream plus a vector: what remains of a block that is gone."""

    def attention(self, layer: int, dims: LayerDims, x: Value, past: Cache) -> tuple[Value, Cache]:
        """Attention up to and including o_proj, without its bias."""

    def mlp(self, layer: int, dims: LayerDims, x: Value) -> Value:
        """The gated FFN up to and including down_proj, without its bias."""

    def head(self, x: Value) -> Value:
        """Logits."""


def record_decoder(dense: DenseArchitecture, dialect: Dialect, recorder: Recorder, dtype: DataType) -> None:
    """Record the whole graph of `dense`, inputs and outputs included, with KV cache and logits in `dtype`."""
    base = dense.base
    input_ids = recorder.input("input_ids", DataType.INT64, ("batch", "sequence"))
    attention_mask = recorder.input("attention_mask", DataType.INT64, ("batch", "total"))
    with_attention = [layer for layer in dense.layers if layer.num_heads]
    pasts = [
        Cache(
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
    stream = Stream(dialect.embed(input_ids))
    presents: list[Cache] = []
    for i, layer in enumerate(dense.layers):
        prefix = f"model.layers.{i}"
        if layer.num_heads:
            x, stream = dialect.norm(stream, f"{prefix}.input_layernorm.weight")
            added, present = dialect.attention(i, layer, x, pasts[len(presents)])
            presents.append(present)
            stream = Stream(stream.base, added)
        if layer.o_bias:
            stream = _with_bias(stream, f"{prefix}.self_attn.o_proj.bias", bool(layer.num_heads), dialect)
        if layer.ffn_size:
            x, stream = dialect.norm(stream, f"{prefix}.post_attention_layernorm.weight")
            stream = Stream(stream.base, dialect.mlp(i, layer, x))
        if layer.down_bias:
            stream = _with_bias(stream, f"{prefix}.mlp.down_proj.bias", bool(layer.ffn_size), dialect)
    x, _ = dialect.norm(stream, "model.norm.weight")
    recorder.output(dialect.head(x), "logits", dtype, ("batch", "sequence", base.vocab_size))
    for i, (layer, present) in enumerate(zip(with_attention, presents, strict=True)):
        for kind in ("key", "value"):
            recorder.output(
                getattr(present, kind),
                f"present.{i}.{kind}",
                dtype,
                ("batch", layer.num_kv_heads, "total", base.head_dim),
            )


def _with_bias(stream: Stream, name: str, block_ran: bool, dialect: Dialect) -> Stream:
    """Add the output bias of a block; one that is gone may have left its bias behind."""
    bias = dialect.output_bias(name)
    if block_ran:
        return Stream(stream.base, stream.added, bias)
    return dialect.add_constant(stream, bias, name)
