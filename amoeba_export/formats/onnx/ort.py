"""The `ort` dialect: onnxruntime's contributed operators, as few nodes per layer as they allow.

Per layer: packed qkv, GroupQueryAttention (RoPE and cache inside), o, norm (sum and bias inside), gate, up, QuickGelu,
Mul, down, norm. All matrices are stored [out, in] and multiplied with `transB`, which onnxruntime packs at load just as
fast as the other way round: a weight goes to disk as it comes, and tied embeddings are one stored matrix.
"""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from amoeba_export.formats.onnx.decoder import Cache, Stream
from amoeba_export.formats.onnx.graph import Recorder
from amoeba_export.formats.onnx.precision import BLOCK_SIZE, LOWEST, Precision
from amoeba_export.formats.onnx.rope import rope_tables
from amoeba_export.formats.onnx.weights import Matrix, WeightStore
from amoeba_export.ir import Architecture, LayerDims

OPSETS = {"": 21, "com.microsoft": 1}
IR_VERSION = 10

_CONTRIB = "com.microsoft"

INT8_ACCURACY = 4
"""`accuracy_level` of MatMulNBits: activations in int8 blocks, the fastest kernels on every CPU."""


@dataclass(frozen=True, slots=True)
class _Lengths:
    """What every attention reads: valid keys less one [batch], tokens in the cache (scalar), and a bias or None."""

    last_key: ir.Value
    total: ir.Value
    bias: ir.Value | None


class OrtDialect:
    """See the module. `left_padding` also masks padding at the left of a row, which GroupQueryAttention does not."""

    def __init__(
        self,
        architecture: Architecture,
        recorder: Recorder,
        store: WeightStore,
        precision: Precision,
        *,
        left_padding: bool,
        last_logits: bool,
    ) -> None:
        self._architecture = architecture
        self._recorder = recorder
        self._store = store
        self._precision = precision
        self._left_padding = left_padding
        self._last_logits = last_logits
        self._embedding: Matrix | None = None
        self._lengths: _Lengths | None = None
        self._rope: tuple[ir.Value, ir.Value] | None = None

    def embed(self, input_ids: ir.Value) -> ir.Value:
        """See `Dialect`."""
        base = self._architecture
        name = "model.embed_tokens.weight"
        matrix = self._store.matrix(name, [(name, base.vocab_size)], base.hidden_size, bits=self._precision.head_bits)
        self._embedding = matrix
        if matrix.bits is None:
            return self._recorder.op("Gather", [matrix.weight, input_ids], name="/model/embed_tokens")
        flat = self._recorder.stored(
            matrix.region, name=f"{matrix.region.name}_rows", shape=(matrix.rows, matrix.region.row_bytes)
        )
        return self._recorder.op(
            "GatherBlockQuantized",
            [flat, input_ids, matrix.scales],
            name="/model/embed_tokens",
            domain=_CONTRIB,
            bits=matrix.bits,
            block_size=BLOCK_SIZE,
            gather_axis=0,
            quantize_axis=1,
        )

    def prepare(self, input_ids: ir.Value, attention_mask: ir.Value) -> None:
        """Lengths from the mask. A row is `first` zeros of left padding, then its tokens, then maybe right padding."""
        record, constant = self._recorder.op, self._recorder.constant
        cos_TH, sin_TH = rope_tables(self._architecture)
        dtype = self._precision.activation
        self._rope = (
            self._store.table("rope.cos", cos_TH, dtype),
            self._store.table("rope.sin", sin_TH, dtype),
        )
        tokens = record("ReduceSum", [attention_mask, constant("axis_1", [1])], name="/mask/tokens", keepdims=0)
        mask_shape = record("Shape", [attention_mask], name="/mask/shape")
        total = record("Gather", [mask_shape, constant("one", 1)], name="/mask/total")
        total_i32 = record("Cast", [total], name="/mask/total_i32", to=int(ir.DataType.INT32))
        if not self._left_padding:
            last = record("Sub", [tokens, constant("one", 1)], name="/mask/last")
            last_i32 = record("Cast", [last], name="/mask/last_i32", to=int(ir.DataType.INT32))
            self._lengths = _Lengths(last_i32, total_i32, None)
            return
        first_B1 = record("ArgMax", [attention_mask], name="/mask/first", axis=1, keepdims=1)
        first = record("Squeeze", [first_B1, constant("axis_1", [1])], name="/mask/first_of_row")
        end = record("Add", [first, tokens], name="/mask/end")
        last = record("Sub", [end, constant("one", 1)], name="/mask/last")
        last_i32 = record("Cast", [last], name="/mask/last_i32", to=int(ir.DataType.INT32))
        keys_T = record("Range", [constant("zero", 0), total, constant("one", 1)], name="/mask/keys")
        padding_BT = record("Less", [keys_T, first_B1], name="/mask/padding")
        bias_BT = record(
            "Where",
            [padding_BT, constant("lowest", LOWEST[dtype], dtype), constant("visible", 0.0, dtype)],
            name="/mask/bias_of_key",
        )
        bias_B11T = record("Unsqueeze", [bias_BT, constant("axes_12", [1, 2])], name="/mask/bias_4d")
        query_shape = record("Shape", [input_ids], name="/mask/queries", start=1)
        # GroupQueryAttention does not broadcast over queries.
        target = record(
            "Concat", [constant("ones", [1, 1]), query_shape, constant("axis_1", [1])], name="/mask/bias_shape", axis=0
        )
        bias = record("Expand", [bias_B11T, target], name="/mask/bias")
        self._lengths = _Lengths(last_i32, total_i32, bias)

    def output_bias(self, name: str) -> ir.Value:
        """See `Dialect`."""
        return self._store.vector(name, [(name, self._architecture.hidden_size)])

    def norm(self, stream: Stream, name: str) -> tuple[ir.Value, Stream]:
        """See `Dialect`."""
        gamma = self._store.vector(name, [(name, self._architecture.hidden_size)])
        node = "/" + name.removesuffix(".weight").replace(".", "/")
        if stream.added is None:
            return self._plain_norm(stream.base, gamma, node), stream
        x, total = self._recorder.ops(
            "SkipSimplifiedLayerNormalization",
            [stream.base, stream.added, gamma] + ([stream.bias] if stream.bias else []),
            name=node,
            outputs=("", None, None, "/sum"),
            domain=_CONTRIB,
            epsilon=self._architecture.norm_eps,
        )[::3]
        return x, Stream(total)

    def _plain_norm(self, x: ir.Value, gamma: ir.Value, node: str) -> ir.Value:
        """RMSNorm of a tensor of rank 3, written as the norm of x + x.

        norm(2x, 4 eps) = norm(x, eps) to the bit, factors being powers of two. The operator that onnxruntime has for
        the norm alone is in no ONNX standard (the checker refuses it), and the standard's needs opset 23.
        """
        return self._recorder.op(
            "SkipSimplifiedLayerNormalization",
            [x, x, gamma],
            name=node,
            domain=_CONTRIB,
            epsilon=4 * self._architecture.norm_eps,
        )

    def add_constant(self, stream: Stream, bias: ir.Value, name: str) -> Stream:
        """See `Dialect`."""
        total = stream.base
        for i, term in enumerate((stream.added, stream.bias, bias)):
            if term is not None:
                total = self._recorder.op("Add", [total, term], name=f"/{name.replace('.', '/')}/add_{i}")
        return Stream(total)

    def attention(self, layer: int, dims: LayerDims, x: ir.Value, past: Cache) -> tuple[ir.Value, Cache]:
        """See `Dialect`."""
        base = self._architecture
        assert self._lengths and self._rope
        prefix, node = f"model.layers.{layer}.self_attn", f"/model/layers/{layer}/self_attn"
        sizes = {
            "q_proj": dims.num_heads * base.head_dim,
            "k_proj": dims.num_kv_heads * base.head_dim,
            "v_proj": dims.num_kv_heads * base.head_dim,
        }
        if base.qk_norm:
            query, key, value = (
                self._linear(x, prefix, {projection: size}, base.hidden_size, bias=dims.qkv_bias)
                for projection, size in sizes.items()
            )
            query = self._head_norm(query, f"{prefix}.q_norm.weight", dims.num_heads)
            key = self._head_norm(key, f"{prefix}.k_norm.weight", dims.num_kv_heads)
            qkv: list[ir.Value | None] = [query, key, value]
        else:
            qkv = [self._linear(x, prefix, sizes, base.hidden_size, bias=dims.qkv_bias), None, None]
        mask = self._lengths
        inputs = [*qkv, past.key, past.value, mask.last_key, mask.total, *self._rope]
        if mask.bias is not None:
            inputs += [None, mask.bias]
        context, key, value = self._recorder.ops(
            "GroupQueryAttention",
            inputs,
            name=f"{node}/attention",
            outputs=("", "/key", "/value"),
            domain=_CONTRIB,
            num_heads=dims.num_heads,
            kv_num_heads=dims.num_kv_heads,
            scale=base.head_dim**-0.5,
            do_rotary=1,
            **({"local_window_size": base.sliding_window} if base.sliding_window else {}),
        )
        output = self._linear(context, prefix, {"o_proj": base.hidden_size}, sizes["q_proj"], bias=False)
        return output, Cache(key, value)

    def mlp(self, layer: int, dims: LayerDims, x: ir.Value) -> ir.Value:
        """See `Dialect`."""
        hidden = self._architecture.hidden_size
        prefix, node = f"model.layers.{layer}.mlp", f"/model/layers/{layer}/mlp"
        gate, up = (
            self._linear(x, prefix, {projection: dims.ffn_size}, hidden, bias=dims.gate_up_bias)
            for projection in ("gate_proj", "up_proj")
        )
        active = self._recorder.op("QuickGelu", [gate], name=f"{node}/silu", domain=_CONTRIB, alpha=1.0)
        gated = self._recorder.op("Mul", [active, up], name=f"{node}/gated")
        return self._linear(gated, prefix, {"down_proj": hidden}, dims.ffn_size, bias=False)

    def head(self, x: ir.Value) -> ir.Value:
        """See `Dialect`."""
        base = self._architecture
        matrix = self._embedding
        assert matrix is not None
        if not base.tied_embeddings:
            name = "lm_head.weight"
            matrix = self._store.matrix(
                name, [(name, base.vocab_size)], base.hidden_size, bits=self._precision.head_bits
            )
        if self._last_logits:
            last = self._recorder.constant("last", [-1])
            x = self._recorder.op("Gather", [x, last], name="/lm_head/last", axis=1)
        return self._multiply(x, matrix, "/lm_head")

    def _head_norm(self, x: ir.Value, name: str, num_heads: int) -> ir.Value:
        """RMSNorm of each head of [batch, sequence, heads * head_dim]."""
        head_dim = self._architecture.head_dim
        node = "/" + name.removesuffix(".weight").replace(".", "/")
        gamma = self._store.vector(name, [(name, head_dim)])
        reshape, constant = self._recorder.op, self._recorder.constant
        heads = reshape("Reshape", [x, constant(f"heads_{head_dim}", [0, -1, head_dim])], name=f"{node}/split")
        normed = self._plain_norm(heads, gamma, node)
        width = num_heads * head_dim
        return reshape("Reshape", [normed, constant(f"width_{width}", [0, -1, width])], name=f"{node}/join")

    def _linear(self, x: ir.Value, prefix: str, parts: dict[str, int], columns: int, *, bias: bool) -> ir.Value:
        """One product for all `parts` (projection: rows), stacked."""
        label = "_".join(part.removesuffix("_proj") for part in parts)
        stored = f"{prefix}.{label}_proj"
        matrix = self._store.matrix(
            f"{stored}.weight",
            [(f"{prefix}.{part}.weight", rows) for part, rows in parts.items()],
            columns,
            bits=self._precision.linear_bits,
        )
        bias_O = (
            self._store.vector(f"{stored}.bias", [(f"{prefix}.{part}.bias", rows) for part, rows in parts.items()])
            if bias
            else None
        )
        return self._multiply(x, matrix, f"/{stored.replace('.', '/')}", bias_O)

    def _multiply(self, x: ir.Value, matrix: Matrix, node: str, bias_O: ir.Value | None = None) -> ir.Value:
        """The product with `matrix` transposed, plus the bias."""
        if matrix.bits is not None:
            return self._recorder.op(
                "MatMulNBits",
                [x, matrix.weight, matrix.scales] + ([None, None, bias_O] if bias_O else []),
                name=node,
                domain=_CONTRIB,
                K=matrix.columns,
                N=matrix.rows,
                bits=matrix.bits,
                block_size=BLOCK_SIZE,
                accuracy_level=INT8_ACCURACY,
            )
        product = self._recorder.op("FusedMatMul", [x, matrix.weight], name=node, domain=_CONTRIB, transB=1)
        return product if bias_O is None else self._recorder.op("Add", [product, bias_O], name=f"{node}/bias")
