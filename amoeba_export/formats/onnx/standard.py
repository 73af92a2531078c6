"""The `standard` dialect: the ONNX standard alone, for TensorRT, OpenVINO and whatever else reads ONNX.

Opset 18, the newest that all of them read in full, and the patterns that their optimizers look for: RMSNorm from Pow to
Mul, attention as two products around a Softmax, weights [in, out]. Softmax and norms run in fp32 in every dtype.
Positions and masks follow from `attention_mask`, so padding may be on either side.

Long on purpose: the operators of one dialect are read together.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from amoeba_export.formats.onnx.datatype import DataType
from amoeba_export.formats.onnx.decoder import LayerCache, Stream
from amoeba_export.formats.onnx.elementwise import activated, capped, scaled, temperature
from amoeba_export.formats.onnx.experts import experts
from amoeba_export.formats.onnx.graph import Recorder, Value
from amoeba_export.formats.onnx.masks import score_biases
from amoeba_export.formats.onnx.names import Names
from amoeba_export.formats.onnx.turns import store_turns, table_rows
from amoeba_export.formats.onnx.weights import WeightStore
from amoeba_export.ir import DenseArchitecture, LayerDims, LayerKind, Role, Rope

_FP32 = DataType.FLOAT


@dataclass(frozen=True, slots=True, kw_only=True)
class _Turn:
    """What layers with one RoPE read: of the positions in this call, [batch, 1, sequence, R / 2]."""

    rope: Rope
    cos: Value
    sin: Value


@dataclass(frozen=True, slots=True, kw_only=True)
class _Shared:
    """What attentions read.

    Attributes:
        turns: Of every RoPE.
        biases: By window: what is added to the scores, [batch, 1, sequence, total].
        temperature: By what queries are multiplied, [batch, 1, sequence, 1]; None for nothing.
    """

    turns: tuple[_Turn, ...]
    biases: Mapping[int | None, Value]
    temperature: Value | None


class StandardDialect:
    """See the module."""

    opsets: ClassVar[Mapping[str, int]] = {"": 18}
    ir_version: ClassVar[int] = 8

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
        self._dtype = store.precision.activation
        self._last_logits = last_logits
        self._embedding: Value | None = None
        self._shared: _Shared | None = None

    def embed(self, input_ids: Value) -> Value:
        """See `Dialect`."""
        base = self._architecture
        name, node = self._names.weight("embedding"), self._names.node("embedding")
        matrix = self._store.matrix(name, [(name, base.vocab_size)], base.hidden_size, encoding=None)
        self._embedding = self._recorder.stored(matrix.region)
        x = self._recorder.op("Gather", [self._embedding, input_ids], name=node)
        return x if base.embedding_scale == 1.0 else self.scale(x, base.embedding_scale, f"{node}/scaled")

    def prepare(self, input_ids: Value, attention_mask: Value) -> None:
        """Positions count the tokens of a row; a query sees what is not padding and not after it."""
        op, constant = self._recorder.op, self._recorder.constant
        zero, one, axis = constant("zero", 0), constant("one", 1), constant("axis_1", [1])
        ids_shape = op("Shape", [input_ids], name="/mask/ids_shape")
        mask_shape = op("Shape", [attention_mask], name="/mask/shape")
        queries = op("Gather", [ids_shape, one], name="/mask/queries")
        total = op("Gather", [mask_shape, one], name="/mask/total")
        past = op("Sub", [total, queries], name="/mask/past")

        counts_BT = op("CumSum", [attention_mask, one], name="/rope/counts")
        from_zero_BT = op("Sub", [counts_BT, one], name="/rope/from_zero")
        all_positions_BT = op("Max", [from_zero_BT, zero], name="/rope/all_positions")
        start = op("Unsqueeze", [past, constant("axis_0", [0])], name="/rope/start")
        end = op("Unsqueeze", [total, constant("axis_0", [0])], name="/rope/end")
        positions_BS = op("Slice", [all_positions_BT, start, end, axis], name="/rope/positions")

        kinds = [self._dense.kind(layer) for layer in self._dense.layers if layer.num_heads]
        windows = tuple(dict.fromkeys(kind.window for kind in kinds or self._architecture.layer_kinds))
        biases = score_biases(attention_mask, past, total, windows, self._recorder)
        turns = self._turns(positions_BS, counts_BT)
        warm = None
        if (rule := self._architecture.query_temperature) is not None:
            factor_BS = temperature(positions_BS, rule, self._recorder, self._dtype)
            warm = op("Unsqueeze", [factor_BS, constant("axes_13", [1, 3])], name="/temperature/4d")
        self._shared = _Shared(turns=turns, biases=biases, temperature=warm)

    def _turns(self, positions_BS: Value, counts_BT: Value) -> tuple[_Turn, ...]:
        """Cosines and sines of the positions in this call."""
        op, turns, longest = self._recorder.op, [], None
        for turn in store_turns(self._dense, self._store):
            if turn.num_short and longest is None:
                longest = op("ReduceMax", [counts_BT], name="/rope/longest", keepdims=0)
            rows_BS = table_rows(positions_BS, turn, longest, self._recorder)
            node = f"/rope/{turn.name}" if turn.name else "/rope"
            axis = self._recorder.constant("axis_1", [1])
            cos, sin = (
                op(
                    "Unsqueeze",
                    [op("Gather", [table, rows_BS], name=f"{node}/{label}"), axis],
                    name=f"{node}/{label}_4d",
                )
                for label, table in (("cos", turn.cos), ("sin", turn.sin))
            )
            turns.append(_Turn(rope=turn.rope, cos=cos, sin=sin))
        return tuple(turns)

    def output_bias(self, role: Role, layer: int) -> Value:
        """See `Dialect`."""
        name = self._names.bias(role, layer)
        return self._store.vector(name, [(name, self._architecture.hidden_size)])

    def norm(self, stream: Stream, role: Role, layer: int | None = None) -> tuple[Value, Stream]:
        """See `Dialect`."""
        node = self._names.node(role, layer)
        total = self.total(stream, node)
        return self._normed(total, role, layer, self._architecture.hidden_size), Stream(total)

    def total(self, stream: Stream, name: str) -> Value:
        """See `Dialect`."""
        total = stream.base
        for label, term in (("add", stream.added), ("add_bias", stream.bias)):
            if term is not None:
                total = self.add(total, term, f"{name}/{label}")
        return total

    def output_norm(self, x: Value, role: Role, layer: int) -> Value:
        """See `Dialect`."""
        return self._normed(x, role, layer, self._architecture.hidden_size)

    def add(self, x: Value, bias: Value, name: str) -> Value:
        """See `Dialect`."""
        return self._recorder.op("Add", [x, bias], name=name)

    def as_row(self, bias: Value, name: str) -> Value:
        """See `Dialect`."""
        shape = self._recorder.constant("row", [1, 1, -1])
        return self._recorder.op("Reshape", [bias, shape], name=name)

    def scale(self, x: Value, factor: float, name: str) -> Value:
        """See `Dialect`."""
        return scaled(x, factor, name, self._recorder, self._dtype)

    def attention(self, layer: int, dims: LayerDims, x: Value, past: LayerCache) -> tuple[Value, LayerCache]:
        """See `Dialect`."""
        base, op, constant = self._architecture, self._recorder.op, self._recorder.constant
        assert self._shared
        kind, node = self._dense.kind(dims), self._names.block("o", layer)
        query = self._heads(x, "q", layer, dims.num_heads, bias=dims.qkv_bias)
        key = self._heads(x, "k", layer, dims.num_kv_heads, bias=dims.qkv_bias)
        value = self._heads(x, "v", layer, dims.num_kv_heads, bias=dims.qkv_bias)
        key_BKTH = op("Concat", [past.key, self._rotate(key, kind, f"{node}/k_rope")], name=f"{node}/keys", axis=2)
        value_BKTH = op("Concat", [past.value, value], name=f"{node}/values", axis=2)
        scale = constant("scale", base.score_scale, self._dtype)
        query_BNSH = op("Mul", [self._rotate(query, kind, f"{node}/q_rope"), scale], name=f"{node}/q_scaled")
        if self._shared.temperature is not None:
            query_BNSH = op("Mul", [query_BNSH, self._shared.temperature], name=f"{node}/q_warm")
        # Query heads of one KV head lie together: [B, K, N / K, S, H] meets its keys [B, K, 1, H, T] by broadcasting,
        # and nothing is repeated in memory.
        group = dims.num_heads // dims.num_kv_heads
        split = constant(f"groups_{dims.num_kv_heads}_{group}", [0, dims.num_kv_heads, group, -1, base.head_dim])
        query_BKGSH = op("Reshape", [query_BNSH, split], name=f"{node}/q_groups")
        axis_2 = constant("axis_2", [2])
        key_BK1TH = op("Unsqueeze", [key_BKTH, axis_2], name=f"{node}/key_groups")
        key_BK1HT = op("Transpose", [key_BK1TH], name=f"{node}/key_columns", perm=[0, 1, 2, 4, 3])
        value_BK1TH = op("Unsqueeze", [value_BKTH, axis_2], name=f"{node}/value_groups")
        scores = op("MatMul", [query_BKGSH, key_BK1HT], name=f"{node}/scores")
        bias_B11ST = op("Unsqueeze", [self._shared.biases[kind.window], constant("axis_1", [1])], name=f"{node}/bias")
        wide = self._to_fp32(scores, f"{node}/scores_fp32")
        if base.attention_softcap is not None:
            wide = capped(wide, base.attention_softcap, f"{node}/capped", self._recorder, _FP32)
        masked = op("Add", [wide, bias_B11ST], name=f"{node}/masked")
        weights = self._from_fp32(op("Softmax", [masked], name=f"{node}/softmax", axis=-1), f"{node}/weights")
        context_BKGSH = op("MatMul", [weights, value_BK1TH], name=f"{node}/context")
        join = constant(f"heads_{dims.num_heads}_{base.head_dim}", [0, dims.num_heads, -1, base.head_dim])
        context_BNSH = op("Reshape", [context_BKGSH, join], name=f"{node}/context_heads")
        context_BSNH = op("Transpose", [context_BNSH], name=f"{node}/context_tokens", perm=[0, 2, 1, 3])
        width = dims.num_heads * base.head_dim
        flat = op("Reshape", [context_BSNH, constant(f"width_{width}", [0, 0, width])], name=f"{node}/context_flat")
        output = self._linear(flat, "o", layer, base.hidden_size, width, bias=False)
        return output, LayerCache(key_BKTH, value_BKTH)

    def mlp(self, layer: int, dims: LayerDims, x: Value) -> Value:
        """See `Dialect`."""
        if self._architecture.expert_size:
            given = (self._architecture, self._names, self._recorder, self._store)
            return experts(x, layer, dims.ffn_size, *given)
        hidden, node = self._architecture.hidden_size, self._names.block("down", layer)
        gate = self._linear(x, "gate", layer, dims.ffn_size, hidden, bias=dims.gate_up_bias)
        up = self._linear(x, "up", layer, dims.ffn_size, hidden, bias=dims.gate_up_bias)
        active = activated(gate, self._architecture.activation, node, self._recorder, self._dtype)
        gated = self._recorder.op("Mul", [active, up], name=f"{node}/gated")
        return self._linear(gated, "down", layer, hidden, dims.ffn_size, bias=False)

    def head(self, x: Value) -> Value:
        """See `Dialect`. Tied weights are stored once, as the embedding; runtimes turn them at load."""
        base, op, node = self._architecture, self._recorder.op, self._names.node("head")
        if self._last_logits:
            x = op("Gather", [x, self._recorder.constant("last", [-1])], name=f"{node}/last", axis=1)
        if base.logits_divisor != 1.0:
            x = self.scale(x, 1 / base.logits_divisor, f"{node}/scaled")
        if not base.has_own_head:
            weight = op("Transpose", [self._embedding], name=f"{node}/weight", perm=[1, 0])
        else:
            weight = self._store.turned(self._names.weight("head"), base.num_logits, base.hidden_size)
        logits = op("MatMul", [x, weight], name=node)
        if base.final_softcap is not None:
            logits = capped(logits, base.final_softcap, f"{node}/capped", self._recorder, self._dtype)
        return logits

    def _heads(self, x: Value, role: Role, layer: int, num_heads: int, *, bias: bool) -> Value:
        """One projection as [batch, heads, sequence, head_dim], normed where the family does so."""
        base, op = self._architecture, self._recorder.op
        node, width = f"{self._names.block(role, layer)}/{role}_heads", num_heads * base.head_dim
        flat = self._linear(x, role, layer, width, base.hidden_size, bias=bias)
        norms: Mapping[Role, Role] = {"q": "q_norm", "k": "k_norm"} if base.qk_norm else {}
        norm = norms.get(role)
        if norm is not None and base.qk_norm_scope == "whole":
            flat, norm = self._normed(flat, norm, layer, width), None
        split = self._recorder.constant(f"split_{num_heads}_{base.head_dim}", [0, 0, num_heads, base.head_dim])
        heads = op("Reshape", [flat, split], name=f"{node}/split")
        if norm is not None:
            heads = self._normed(heads, norm, layer, base.head_dim)
        return op("Transpose", [heads], name=node, perm=[0, 2, 1, 3])

    def _rotate(self, x: Value, kind: LayerKind, node: str) -> Value:
        """RoPE: the first half of what turns in a head turns against its second half."""
        assert self._shared
        turn = next((turn for turn in self._shared.turns if turn.rope == kind.rope), None)
        if turn is None:
            return x
        op, half = self._recorder.op, turn.rope.dims // 2
        rest = self._architecture.head_dim - turn.rope.dims
        cos, sin = turn.cos, turn.sin
        parts = [half, half, rest] if rest else [half, half]
        sizes = self._recorder.constant("halves" if not rest else f"halves_{half}_{rest}", parts)
        labels = ["/first", "/second", "/rest"] if rest else ["/first", "/second"]
        first, second, *passing = self._recorder.ops("Split", [x, sizes], name=node, outputs=labels, axis=-1)
        first_cos = op("Mul", [first, cos], name=f"{node}/first_cos")
        second_sin = op("Mul", [second, sin], name=f"{node}/second_sin")
        second_cos = op("Mul", [second, cos], name=f"{node}/second_cos")
        first_sin = op("Mul", [first, sin], name=f"{node}/first_sin")
        turned_first = op("Sub", [first_cos, second_sin], name=f"{node}/turned_first")
        turned_second = op("Add", [second_cos, first_sin], name=f"{node}/turned_second")
        return op("Concat", [turned_first, turned_second, *passing], name=f"{node}/turned", axis=-1)

    def _normed(self, x: Value, role: Role, layer: int | None, size: int) -> Value:
        """RMSNorm over the last axis with the weight of a role."""
        gamma = self._store.norm(self._names.weight(role, layer), size, self._architecture.norm_offset)
        return self._rms_norm(x, gamma, self._names.node(role, layer))

    def _rms_norm(self, x: Value, gamma: Value, node: str) -> Value:
        """RMSNorm over the last axis, in fp32 up to the multiplication with `gamma`, as transformers has it."""
        op, constant = self._recorder.op, self._recorder.constant
        wide = self._to_fp32(x, f"{node}/fp32")
        square = op("Pow", [wide, constant("two", 2.0, _FP32)], name=f"{node}/square")
        mean = op("ReduceMean", [square, constant("last_axis", [-1])], name=f"{node}/mean", keepdims=1)
        safe = op("Add", [mean, constant("norm_eps", self._architecture.norm_eps, _FP32)], name=f"{node}/safe")
        root = op("Sqrt", [safe], name=f"{node}/root")
        normed = self._from_fp32(op("Div", [wide, root], name=f"{node}/normed"), f"{node}/narrow")
        return op("Mul", [normed, gamma], name=node)

    def _linear(self, x: Value, role: Role, layer: int, rows: int, columns: int, *, bias: bool) -> Value:
        """The product with one weight, plus its bias."""
        node = self._names.node(role, layer)
        weight = self._store.turned(self._names.weight(role, layer), rows, columns)
        product = self._recorder.op("MatMul", [x, weight], name=node)
        if not bias:
            return product
        name = self._names.bias(role, layer)
        return self._recorder.op("Add", [product, self._store.vector(name, [(name, rows)])], name=f"{node}/bias")

    def _to_fp32(self, x: Value, node: str) -> Value:
        return x if self._dtype == _FP32 else self._recorder.op("Cast", [x], name=node, to=int(_FP32))

    def _from_fp32(self, x: Value, node: str) -> Value:
        return x if self._dtype == _FP32 else self._recorder.op("Cast", [x], name=node, to=int(self._dtype))
