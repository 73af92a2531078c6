"""The `standard` dialect: the ONNX standard alone, for TensorRT, OpenVINO and whatever else reads ONNX.

Opset 18, the newest that all of them read in full, and the patterns that their optimizers look for: RMSNorm from Pow to
Mul, attention as two products around a Softmax, weights [in, out]. Softmax and norms run in fp32 in every dtype.
Positions and masks follow from `attention_mask`, so padding may be on either side.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch

from amoeba_export.formats.onnx.datatype import DataType
from amoeba_export.formats.onnx.decoder import Cache, Stream
from amoeba_export.formats.onnx.graph import Recorder, Value
from amoeba_export.formats.onnx.precision import Precision
from amoeba_export.formats.onnx.rope import rope_tables
from amoeba_export.formats.onnx.weights import WeightStore
from amoeba_export.ir import Architecture, LayerDims

_FP32 = DataType.FLOAT

_LOWEST = float(torch.finfo(torch.float32).min)
"""Added to the score of a key that must not be seen. Finite, so that a row that sees nothing is not NaN."""


@dataclass(frozen=True, slots=True)
class _Shared:
    """What every attention reads.

    Attributes:
        cos: Of the positions in this call, [batch, 1, sequence, H / 2]; `sin` alike.
        bias: Added to the scores, [batch, 1, sequence, total].
    """

    cos: Value
    sin: Value
    bias: Value


class StandardDialect:
    """See the module."""

    opsets: ClassVar[Mapping[str, int]] = {"": 18}
    ir_version: ClassVar[int] = 8

    def __init__(
        self,
        architecture: Architecture,
        recorder: Recorder,
        store: WeightStore,
        precision: Precision,
        *,
        last_logits: bool,
    ) -> None:
        self._architecture = architecture
        self._recorder = recorder
        self._store = store
        self._dtype = precision.activation
        self._last_logits = last_logits
        self._embedding: Value | None = None
        self._shared: _Shared | None = None

    def embed(self, input_ids: Value) -> Value:
        """See `Dialect`."""
        base = self._architecture
        name = "model.embed_tokens.weight"
        matrix = self._store.matrix(name, [(name, base.vocab_size)], base.hidden_size, encoding=None)
        self._embedding = self._recorder.stored(matrix.region)
        return self._recorder.op("Gather", [self._embedding, input_ids], name="/model/embed_tokens")

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

        keys_T = op("Range", [zero, total, one], name="/mask/keys")
        query_S = op("Range", [past, total, one], name="/mask/query")
        query_S1 = op("Unsqueeze", [query_S, axis], name="/mask/query_column")
        visible_ST = op("LessOrEqual", [keys_T, query_S1], name="/mask/causal")
        if self._architecture.sliding_window:
            window = constant("window", self._architecture.sliding_window)
            oldest_S1 = op("Sub", [query_S1, window], name="/mask/before_window")
            in_window_ST = op("Greater", [keys_T, oldest_S1], name="/mask/in_window")
            visible_ST = op("And", [visible_ST, in_window_ST], name="/mask/causal_window")
        real_BT = op("Cast", [attention_mask], name="/mask/real", to=int(DataType.BOOL))
        real_B11T = op("Unsqueeze", [real_BT, constant("axes_12", [1, 2])], name="/mask/real_4d")
        visible_B1ST = op("And", [real_B11T, visible_ST], name="/mask/visible")
        bias = op(
            "Where",
            [visible_B1ST, constant("shown", 0.0, _FP32), constant("hidden", _LOWEST, _FP32)],
            name="/mask/bias",
        )
        cos, sin = (
            op(
                "Unsqueeze",
                [
                    op("Gather", [self._store.table(f"rope.{label}", table, self._dtype), positions_BS], name=node),
                    axis,
                ],
                name=f"{node}_4d",
            )
            for label, table, node in zip(
                ("cos", "sin"), rope_tables(self._architecture), ("/rope/cos", "/rope/sin"), strict=True
            )
        )
        self._shared = _Shared(cos, sin, bias)

    def output_bias(self, name: str) -> Value:
        """See `Dialect`."""
        return self._store.vector(name, [(name, self._architecture.hidden_size)])

    def norm(self, stream: Stream, name: str) -> tuple[Value, Stream]:
        """See `Dialect`."""
        node = "/" + name.removesuffix(".weight").replace(".", "/")
        total = stream.base
        for label, term in (("add", stream.added), ("add_bias", stream.bias)):
            if term is not None:
                total = self._recorder.op("Add", [total, term], name=f"{node}/{label}")
        gamma = self._store.vector(name, [(name, self._architecture.hidden_size)])
        return self._rms_norm(total, gamma, node), Stream(total)

    def add_constant(self, stream: Stream, bias: Value, name: str) -> Stream:
        """See `Dialect`."""
        total = stream.base
        for i, term in enumerate((stream.added, stream.bias, bias)):
            if term is not None:
                total = self._recorder.op("Add", [total, term], name=f"/{name.replace('.', '/')}/add_{i}")
        return Stream(total)

    def attention(self, layer: int, dims: LayerDims, x: Value, past: Cache) -> tuple[Value, Cache]:
        """See `Dialect`."""
        base, op, constant = self._architecture, self._recorder.op, self._recorder.constant
        assert self._shared
        prefix, node = f"model.layers.{layer}.self_attn", f"/model/layers/{layer}/self_attn"
        query, key, value = (
            self._heads(x, prefix, part, num_heads, bias=dims.qkv_bias)
            for part, num_heads in (("q", dims.num_heads), ("k", dims.num_kv_heads), ("v", dims.num_kv_heads))
        )
        key_BKTH = op("Concat", [past.key, self._rotate(key, f"{node}/k_rope")], name=f"{node}/keys", axis=2)
        value_BKTH = op("Concat", [past.value, value], name=f"{node}/values", axis=2)
        scale = constant("scale", base.head_dim**-0.5, self._dtype)
        query_BNSH = op("Mul", [self._rotate(query, f"{node}/q_rope"), scale], name=f"{node}/q_scaled")
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
        bias_B11ST = op("Unsqueeze", [self._shared.bias, constant("axis_1", [1])], name=f"{node}/bias")
        masked = op("Add", [self._to_fp32(scores, f"{node}/scores_fp32"), bias_B11ST], name=f"{node}/masked")
        weights = self._from_fp32(op("Softmax", [masked], name=f"{node}/softmax", axis=-1), f"{node}/weights")
        context_BKGSH = op("MatMul", [weights, value_BK1TH], name=f"{node}/context")
        join = constant(f"heads_{dims.num_heads}_{base.head_dim}", [0, dims.num_heads, -1, base.head_dim])
        context_BNSH = op("Reshape", [context_BKGSH, join], name=f"{node}/context_heads")
        context_BSNH = op("Transpose", [context_BNSH], name=f"{node}/context_tokens", perm=[0, 2, 1, 3])
        width = dims.num_heads * base.head_dim
        flat = op("Reshape", [context_BSNH, constant(f"width_{width}", [0, 0, width])], name=f"{node}/context_flat")
        output = self._linear(flat, prefix, "o_proj", base.hidden_size, width, bias=False)
        return output, Cache(key_BKTH, value_BKTH)

    def mlp(self, layer: int, dims: LayerDims, x: Value) -> Value:
        """See `Dialect`."""
        hidden = self._architecture.hidden_size
        prefix, node = f"model.layers.{layer}.mlp", f"/model/layers/{layer}/mlp"
        gate = self._linear(x, prefix, "gate_proj", dims.ffn_size, hidden, bias=dims.gate_up_bias)
        up = self._linear(x, prefix, "up_proj", dims.ffn_size, hidden, bias=dims.gate_up_bias)
        sigmoid = self._recorder.op("Sigmoid", [gate], name=f"{node}/sigmoid")
        active = self._recorder.op("Mul", [gate, sigmoid], name=f"{node}/silu")
        gated = self._recorder.op("Mul", [active, up], name=f"{node}/gated")
        return self._linear(gated, prefix, "down_proj", hidden, dims.ffn_size, bias=False)

    def head(self, x: Value) -> Value:
        """See `Dialect`. Tied weights are stored once, as the embedding; runtimes turn them at load."""
        base, op = self._architecture, self._recorder.op
        if self._last_logits:
            x = op("Gather", [x, self._recorder.constant("last", [-1])], name="/lm_head/last", axis=1)
        if base.tied_embeddings:
            weight = op("Transpose", [self._embedding], name="/lm_head/weight", perm=[1, 0])
        else:
            weight = self._store.turned("lm_head.weight", base.vocab_size, base.hidden_size)
        return op("MatMul", [x, weight], name="/lm_head")

    def _heads(self, x: Value, prefix: str, part: str, num_heads: int, *, bias: bool) -> Value:
        """One projection as [batch, heads, sequence, head_dim], normed per head where the family does so."""
        base, op = self._architecture, self._recorder.op
        node = f"/{prefix.replace('.', '/')}/{part}_heads"
        flat = self._linear(x, prefix, f"{part}_proj", num_heads * base.head_dim, base.hidden_size, bias=bias)
        split = self._recorder.constant(f"split_{num_heads}_{base.head_dim}", [0, 0, num_heads, base.head_dim])
        heads = op("Reshape", [flat, split], name=f"{node}/split")
        if base.qk_norm and part != "v":
            name = f"{prefix}.{part}_norm.weight"
            gamma = self._store.vector(name, [(name, base.head_dim)])
            heads = self._rms_norm(heads, gamma, f"/{prefix.replace('.', '/')}/{part}_norm")
        return op("Transpose", [heads], name=node, perm=[0, 2, 1, 3])

    def _rotate(self, x: Value, node: str) -> Value:
        """RoPE: each head's first half turns against its second half."""
        assert self._shared
        op, half = self._recorder.op, self._architecture.head_dim // 2
        cos, sin = self._shared.cos, self._shared.sin
        halves = self._recorder.constant("halves", [half, half])
        first, second = self._recorder.ops("Split", [x, halves], name=node, outputs=("/first", "/second"), axis=-1)
        first_cos = op("Mul", [first, cos], name=f"{node}/first_cos")
        second_sin = op("Mul", [second, sin], name=f"{node}/second_sin")
        second_cos = op("Mul", [second, cos], name=f"{node}/second_cos")
        first_sin = op("Mul", [first, sin], name=f"{node}/first_sin")
        turned_first = op("Sub", [first_cos, second_sin], name=f"{node}/turned_first")
        turned_second = op("Add", [second_cos, first_sin], name=f"{node}/turned_second")
        return op("Concat", [turned_first, turned_second], name=f"{node}/turned", axis=-1)

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

    def _linear(self, x: Value, prefix: str, part: str, rows: int, columns: int, *, bias: bool) -> Value:
        """The product with one weight, plus its bias."""
        name = f"{prefix}.{part}"
        node = f"/{name.replace('.', '/')}"
        product = self._recorder.op("MatMul", [x, self._store.turned(f"{name}.weight", rows, columns)], name=node)
        if not bias:
            return product
        bias_O = self._store.vector(f"{name}.bias", [(f"{name}.bias", rows)])
        return self._recorder.op("Add", [product, bias_O], name=f"{node}/bias")

    def _to_fp32(self, x: Value, node: str) -> Value:
        return x if self._dtype == _FP32 else self._recorder.op("Cast", [x], name=node, to=int(_FP32))

    def _from_fp32(self, x: Value, node: str) -> Value:
        return x if self._dtype == _FP32 else self._recorder.op("Cast", [x], name=node, to=int(self._dtype))
