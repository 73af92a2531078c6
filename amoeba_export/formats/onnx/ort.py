"""The `ort` dialect: onnxruntime's contributed operators, as few nodes per layer as they allow.

Per layer: packed qkv, GroupQueryAttention (RoPE and cache inside), o, norm (sum and bias inside), gate, up, QuickGelu,
Mul, down, norm. All matrices are stored [out, in] and multiplied with `transB`, which onnxruntime packs at load and
runs as fast as the other way round: a weight goes to disk as it comes, packed matrices are their parts one after the
other, and tied embeddings are one stored matrix.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from amoeba_export.formats.onnx.decoder import LayerCache, Stream
from amoeba_export.formats.onnx.elementwise import capped, scaled, temperature
from amoeba_export.formats.onnx.experts import experts
from amoeba_export.formats.onnx.graph import Recorder, Value
from amoeba_export.formats.onnx.names import Names
from amoeba_export.formats.onnx.padding import Rows, from_left, rows_of, to_left
from amoeba_export.formats.onnx.precision import Blockwise
from amoeba_export.formats.onnx.products import CONTRIB, Products
from amoeba_export.formats.onnx.turns import Turn, store_turns, table_rows
from amoeba_export.formats.onnx.weights import Matrix, WeightStore
from amoeba_export.ir import DenseArchitecture, LayerDims, Role

HEAD_MULTIPLE = 16
"""GroupQueryAttention that turns its heads takes heads of a multiple of this many."""


class OrtDialect:
    """See the module."""

    opsets: ClassVar[Mapping[str, int]] = {"": 21, CONTRIB: 1}
    ir_version: ClassVar[int] = 10

    def __init__(
        self,
        dense: DenseArchitecture,
        names: Names,
        recorder: Recorder,
        store: WeightStore,
        *,
        last_logits: bool,
    ) -> None:
        self._dense = dense
        self._architecture = dense.base
        self._names = names
        self._recorder = recorder
        self._store = store
        self._products = Products(recorder)
        self._precision = store.precision
        self._last_logits = last_logits
        self._embedding: Matrix | None = None
        self._rows: Rows | None = None
        self._turns: list[Turn] = []
        self._table_rows: dict[str, Value] = {}
        self._temperature: Value | None = None

    def embed(self, input_ids: Value) -> Value:
        """See `Dialect`.

        The rows are moved, and not the ids: onnxruntime then makes the small values of the mask after the first large
        one, and places them between large ones. Else large values whose size is a multiple of a page all begin at one
        offset within their pages, and norms are slower. benchmarks/peers.md has figures.
        """
        base = self._architecture
        name, node = self._names.weight("embedding"), self._names.node("embedding")
        matrix = self._store.matrix(name, [(name, base.vocab_size)], base.hidden_size, encoding=self._head_encoding)
        self._embedding = matrix
        assert self._rows
        x = self._products.look_up(matrix, input_ids, node)
        x = to_left(x, self._rows, f"{node}/moved", self._recorder, self._precision.activation)
        return x if base.embedding_scale == 1.0 else self.scale(x, base.embedding_scale, f"{node}/scaled")

    def prepare(self, input_ids: Value, attention_mask: Value) -> None:
        """See `Dialect`.

        The tokens of a row are moved to its left end, padding following them, and back before lm_head. In the cache
        they are where they were moved to, and RoPE counts from there.
        """
        self._turns = store_turns(self._dense, self._store)
        rows = self._rows = rows_of(input_ids, attention_mask, self._recorder)
        rule = self._architecture.query_temperature
        if rule is None and not any(turn.num_short for turn in self._turns):
            return
        op, constant = self._recorder.op, self._recorder.constant
        # Tokens are moved to the left, so that positions count from the first of them that is new.
        first_B1 = op(
            "Unsqueeze",
            [op("Sub", [rows.reach, rows.new], name="/positions/cached"), constant("axis_1", [1])],
            name="/positions/first",
        )
        zero, one = constant("zero", 0), constant("one", 1)
        new_S = op("Range", [zero, op("Squeeze", [rows.width], name="/positions/length"), one], name="/positions/new")
        positions_BS = op("Add", [first_B1, new_S], name="/positions")
        longest = op("ReduceMax", [rows.tokens], name="/positions/longest", keepdims=0)
        for turn in self._turns:
            self._table_rows[turn.name] = table_rows(positions_BS, turn, longest, self._recorder)
        if rule is not None:
            factor_BS = temperature(positions_BS, rule, self._recorder, self._precision.activation)
            self._temperature = op("Unsqueeze", [factor_BS, constant("last_axis", [-1])], name="/temperature")

    def output_bias(self, role: Role, layer: int) -> Value:
        """See `Dialect`."""
        name = self._names.bias(role, layer)
        return self._store.vector(name, [(name, self._architecture.hidden_size)])

    def norm(self, stream: Stream, role: Role, layer: int | None = None) -> tuple[Value, Stream]:
        """See `Dialect`."""
        gamma, node = self._gamma(role, layer, self._architecture.hidden_size)
        if stream.added is None:
            return self._plain_norm(stream.base, gamma, node), stream
        x, total = self._recorder.ops(
            "SkipSimplifiedLayerNormalization",
            [stream.base, stream.added, gamma] + ([stream.bias] if stream.bias else []),
            name=node,
            outputs=("", None, None, "/sum"),
            domain=CONTRIB,
            epsilon=self._architecture.norm_eps,
        )[::3]
        return x, Stream(total)

    def total(self, stream: Stream, name: str) -> Value:
        """See `Dialect`."""
        total = stream.base
        for label, term in (("added", stream.added), ("bias", stream.bias)):
            if term is not None:
                total = self.add(total, term, f"{name}/{label}")
        return total

    def output_norm(self, x: Value, role: Role, layer: int) -> Value:
        """See `Dialect`."""
        gamma, node = self._gamma(role, layer, self._architecture.hidden_size)
        return self._plain_norm(x, gamma, node)

    def _gamma(self, role: Role, layer: int | None, size: int) -> tuple[Value, str]:
        """What a norm multiplies with, and its node."""
        name = self._names.weight(role, layer)
        return self._store.norm(name, size, self._architecture.norm_offset), self._names.node(role, layer)

    def _plain_norm(self, x: Value, gamma: Value, node: str) -> Value:
        """RMSNorm of a tensor of rank 3, written as the norm of x + x.

        norm(2x, 4 eps) = norm(x, eps) to the bit, factors being powers of two. The operator that onnxruntime has for
        the norm alone is in no ONNX standard (the checker refuses it), and the standard's needs opset 23.
        """
        return self._recorder.op(
            "SkipSimplifiedLayerNormalization",
            [x, x, gamma],
            name=node,
            domain=CONTRIB,
            epsilon=4 * self._architecture.norm_eps,
        )

    def add(self, x: Value, bias: Value, name: str) -> Value:
        """See `Dialect`."""
        return self._recorder.op("Add", [x, bias], name=name)

    def as_row(self, bias: Value, name: str) -> Value:
        """See `Dialect`."""
        shape = self._recorder.constant("row", [1, 1, -1])
        return self._recorder.op("Reshape", [bias, shape], name=name)

    def scale(self, x: Value, factor: float, name: str) -> Value:
        """See `Dialect`."""
        return scaled(x, factor, name, self._recorder, self._precision.activation)

    def attention(self, layer: int, dims: LayerDims, x: Value, past: LayerCache) -> tuple[Value, LayerCache]:
        """See `Dialect`."""
        base, kind = self._architecture, self._dense.kind(dims)
        assert self._rows
        turn = next((turn for turn in self._turns if turn.rope == kind.rope), None)
        apart = base.qk_norm or self._temperature is not None or (turn is not None and turn.num_short > 0)
        heads: dict[Role, int] = {"q": dims.num_heads, "k": dims.num_kv_heads, "v": dims.num_kv_heads}
        widths = {role: count * base.head_dim for role, count in heads.items()}
        qkv: list[Value | None]
        if apart:
            query, key, value = (
                self._linear(x, layer, {role: width}, base.hidden_size, bias=dims.qkv_bias)
                for role, width in widths.items()
            )
            if base.qk_norm:
                query = self._head_norm(query, "q_norm", layer, dims.num_heads)
                key = self._head_norm(key, "k_norm", layer, dims.num_kv_heads)
            if self._temperature is not None:
                query = self._recorder.op(
                    "Mul", [query, self._temperature], name=f"{self._names.node('q', layer)}/warm"
                )
            if turn is not None and turn.num_short:
                query = self._turned(query, turn, dims.num_heads, self._names.node("q", layer))
                key = self._turned(key, turn, dims.num_kv_heads, self._names.node("k", layer))
                turn = None
            qkv = [query, key, value]
        else:
            qkv = [self._linear(x, layer, widths, base.hidden_size, bias=dims.qkv_bias), None, None]
        inputs = [*qkv, past.key, past.value, self._rows.last_key, self._rows.total]
        context, key, value = self._recorder.ops(
            "GroupQueryAttention",
            inputs if turn is None else [*inputs, turn.cos, turn.sin],
            name=f"{self._names.block('o', layer)}/attention",
            outputs=("", "/key", "/value"),
            domain=CONTRIB,
            num_heads=dims.num_heads,
            kv_num_heads=dims.num_kv_heads,
            scale=base.score_scale,
            do_rotary=int(turn is not None),
            **({"local_window_size": kind.window} if kind.window else {}),
            **({"softcap": base.attention_softcap} if base.attention_softcap else {}),
        )
        output = self._linear(context, layer, {"o": base.hidden_size}, widths["q"], bias=False)
        return output, LayerCache(key, value)

    def _turned(self, x: Value, turn: Turn, num_heads: int, node: str) -> Value:
        """`x` [batch, sequence, heads * head_dim] turned by rows of a table that GroupQueryAttention does not find."""
        return self._recorder.op(
            "RotaryEmbedding",
            [x, self._table_rows[turn.name], turn.cos, turn.sin],
            name=f"{node}/turned",
            domain=CONTRIB,
            num_heads=num_heads,
            rotary_embedding_dim=turn.rope.dims,
        )

    def mlp(self, layer: int, dims: LayerDims, x: Value) -> Value:
        """See `Dialect`. Gate and up are two products: one would need a Split, which copies what it made."""
        if self._architecture.expert_size:
            given = (self._architecture, self._names, self._recorder, self._store)
            return experts(x, layer, dims.ffn_size, *given)
        hidden, node = self._architecture.hidden_size, self._names.block("down", layer)
        roles: tuple[Role, ...] = ("gate", "up")
        gate, up = (self._linear(x, layer, {role: dims.ffn_size}, hidden, bias=dims.gate_up_bias) for role in roles)
        if self._architecture.activation == "silu":
            active = self._recorder.op("QuickGelu", [gate], name=f"{node}/silu", domain=CONTRIB, alpha=1.0)
        else:  # FastGelu is the approximation by tanh
            active = self._recorder.op("FastGelu", [gate], name=f"{node}/gelu_tanh", domain=CONTRIB)
        gated = self._recorder.op("Mul", [active, up], name=f"{node}/gated")
        return self._linear(gated, layer, {"down": hidden}, dims.ffn_size, bias=False)

    def head(self, x: Value) -> Value:
        """See `Dialect`."""
        base, node = self._architecture, self._names.node("head")
        matrix = self._embedding
        assert matrix is not None
        if base.has_own_head:
            name = self._names.weight("head")
            matrix = self._store.matrix(name, [(name, base.num_logits)], base.hidden_size, encoding=self._head_encoding)
        assert self._rows
        x = from_left(x, self._rows, f"{node}/moved_back", self._recorder, self._precision.activation)
        if self._last_logits:
            last = self._recorder.constant("last", [-1])
            x = self._recorder.op("Gather", [x, last], name=f"{node}/last", axis=1)
        if base.logits_divisor != 1.0:
            x = self.scale(x, 1 / base.logits_divisor, f"{node}/scaled")
        logits = self._products.multiply(x, matrix, node)
        if base.final_softcap is not None:
            logits = capped(logits, base.final_softcap, f"{node}/capped", self._recorder, self._precision.activation)
        return logits

    @property
    def _head_encoding(self) -> Blockwise | None:
        return self._precision.head_of(self._architecture.hidden_size)

    def _head_norm(self, x: Value, role: Role, layer: int, num_heads: int) -> Value:
        """RMSNorm of each head of [batch, sequence, heads * head_dim], or of all of them together."""
        base, width = self._architecture, num_heads * self._architecture.head_dim
        if base.qk_norm_scope == "whole":
            return self._plain_norm(x, *self._gamma(role, layer, width))
        head_dim = base.head_dim
        gamma, node = self._gamma(role, layer, head_dim)
        reshape, constant = self._recorder.op, self._recorder.constant
        heads = reshape("Reshape", [x, constant(f"heads_{head_dim}", [0, -1, head_dim])], name=f"{node}/split")
        normed = self._plain_norm(heads, gamma, node)
        return reshape("Reshape", [normed, constant(f"width_{width}", [0, -1, width])], name=f"{node}/join")

    def _linear(self, x: Value, layer: int, parts: Mapping[Role, int], columns: int, *, bias: bool) -> Value:
        """One product for all `parts` (role: rows), stacked."""
        names = self._names
        stored = names.stacked(tuple(parts), layer)
        matrix = self._store.matrix(
            f"{stored}.weight",
            [(names.weight(role, layer), rows) for role, rows in parts.items()],
            columns,
            encoding=self._precision.linear,
        )
        bias_O = (
            self._store.vector(f"{stored}.bias", [(names.bias(role, layer), rows) for role, rows in parts.items()])
            if bias
            else None
        )
        return self._products.multiply(x, matrix, f"/{stored.replace('.', '/')}", bias_O)
