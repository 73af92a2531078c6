"""The `ort` dialect: onnxruntime's contributed operators, as few nodes per layer as they allow.

Per layer: packed qkv, GroupQueryAttention (RoPE and cache inside), o, norm (sum and bias inside), gate, up, QuickGelu,
Mul, down, norm. All matrices are stored [out, in] and multiplied with `transB`, which onnxruntime packs at load and
runs as fast as the other way round: a weight goes to disk as it comes, packed matrices are their parts one after the
other, and tied embeddings are one stored matrix.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from amoeba_export.formats.onnx.datatype import DataType
from amoeba_export.formats.onnx.decoder import Cache, Stream
from amoeba_export.formats.onnx.graph import Recorder, Value
from amoeba_export.formats.onnx.precision import Blockwise, Precision
from amoeba_export.formats.onnx.rope import rope_tables
from amoeba_export.formats.onnx.weights import Matrix, WeightStore
from amoeba_export.ir import Architecture, LayerDims

_CONTRIB = "com.microsoft"

HEAD_MULTIPLE = 16
"""GroupQueryAttention that turns its heads takes heads of a multiple of this many."""

INT8_ACCURACY = 4
"""`accuracy_level` of MatMulNBits: activations in int8 blocks, the fastest kernels on every CPU."""


@dataclass(frozen=True, slots=True)
class _Rows:
    """What is known of the rows of a batch.

    Attributes:
        last_key: Tokens of each row, those in the cache included, less one [batch].
        total: Length of the mask [1].
        new: New positions of each row, from its first token on [batch].
        length: New positions, padding included: the same for each row [batch].
    """

    last_key: Value
    total: Value
    new: Value
    length: Value


class OrtDialect:
    """See the module."""

    opsets: ClassVar[Mapping[str, int]] = {"": 21, _CONTRIB: 1}
    ir_version: ClassVar[int] = 10

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
        self._precision = precision
        self._last_logits = last_logits
        self._embedding: Matrix | None = None
        self._rows: _Rows | None = None
        self._rope: tuple[Value, Value] | None = None
        self._summed: dict[Value, Value] = {}

    def embed(self, input_ids: Value) -> Value:
        """See `Dialect`.

        The rows are moved, and not the ids: onnxruntime then makes the small values of the mask after the first large
        one, and places them between large ones. Else large values whose size is a multiple of a page all begin at one
        offset within their pages, and norms are slower. benchmarks/peers.md has figures.
        """
        base = self._architecture
        name = "model.embed_tokens.weight"
        matrix = self._store.matrix(name, [(name, base.vocab_size)], base.hidden_size, encoding=self._head_encoding)
        self._embedding = matrix
        return self._to_left(self._look_up(matrix, input_ids, "/model/embed_tokens"), "/model/embed_tokens/moved")

    def _look_up(self, matrix: Matrix, ids: Value, node: str) -> Value:
        """The rows of `matrix` for `ids` [batch, sequence]."""
        if matrix.scales is None or matrix.encoding is None:
            return self._recorder.op("Gather", [self._recorder.stored(matrix.region), ids], name=node)
        flat = self._recorder.stored(
            matrix.region, name=f"{matrix.region.name}_rows", shape=(matrix.rows, matrix.region.row_bytes)
        )
        return self._recorder.op(
            "GatherBlockQuantized",
            [flat, ids, self._recorder.stored(matrix.scales)],
            name=node,
            domain=_CONTRIB,
            bits=matrix.encoding.bits,
            block_size=matrix.encoding.block_size,
            gather_axis=0,
            quantize_axis=1,
        )

    def prepare(self, input_ids: Value, attention_mask: Value) -> None:
        """See `Dialect`. A row of the mask is left padding, then tokens, then maybe right padding.

        GroupQueryAttention takes the number of keys of each row and knows no other padding than at the right. So the
        tokens of a row are moved to its left end, padding following them, and back before lm_head. In the cache they
        are where they were moved to, and RoPE counts from there.
        """
        cos_TH, sin_TH = rope_tables(self._architecture)
        dtype = self._precision.activation
        self._rope = (
            self._store.table("rope.cos", cos_TH, dtype),
            self._store.table("rope.sin", sin_TH, dtype),
        )
        op, constant = self._recorder.op, self._recorder.constant
        tokens_B = op("ReduceSum", [attention_mask, constant("axis_1", [1])], name="/mask/tokens", keepdims=0)
        last_B = op("Sub", [tokens_B, constant("one", 1)], name="/mask/last")
        last_i32 = op("Cast", [last_B], name="/mask/last_i32", to=int(DataType.INT32))
        total = op("Shape", [attention_mask], name="/mask/total", start=1)
        total_i32 = op("Cast", [total], name="/mask/total_i32", to=int(DataType.INT32))
        # The mask is as long as the cache and the new tokens: from a row's first token to its end are its new
        # positions, or more, when it began in the cache.
        padding_B = op("ArgMax", [attention_mask], name="/mask/padding", axis=1, keepdims=0)
        reach_B = op("Sub", [total, padding_B], name="/mask/reach")
        length = op("Shape", [input_ids], name="/mask/length", start=1)
        new_B = op("Min", [reach_B, length], name="/mask/new")
        self._rows = _Rows(last_i32, total_i32, new_B, op("Max", [new_B, length], name="/mask/lengths"))

    def _to_left(self, x: Value, name: str) -> Value:
        """`x` [batch, sequence, hidden], the left padding of each row moved to its right end.

        Each row is reversed, and then what is no left padding once more.
        """
        assert self._rows
        return self._reversed_twice(x, (self._rows.length, self._rows.new), name)

    def _from_left(self, x: Value, name: str) -> Value:
        """The inverse of `_to_left`."""
        assert self._rows
        return self._reversed_twice(x, (self._rows.new, self._rows.length), name)

    def _reversed_twice(self, x: Value, counts: tuple[Value, Value], name: str) -> Value:
        """`x` with the first positions of each row reversed: as many as the first count [batch], then as the second."""
        op = self._recorder.op
        # onnxruntime's CUDA provider takes the node with bfloat16, and fails when it runs.
        as_fp32 = self._precision.activation == DataType.BFLOAT16
        if as_fp32:
            x = op("Cast", [x], name=f"{name}/fp32", to=int(DataType.FLOAT))
        for suffix, count_B in zip(("/first", "/second"), counts, strict=True):
            x = op("ReverseSequence", [x, count_B], name=name + suffix, batch_axis=0, time_axis=1)
        return op("Cast", [x], name=f"{name}/bf16", to=int(DataType.BFLOAT16)) if as_fp32 else x

    def output_bias(self, name: str) -> Value:
        """See `Dialect`."""
        return self._store.vector(name, [(name, self._architecture.hidden_size)])

    def norm(self, stream: Stream, name: str) -> tuple[Value, Stream]:
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

    def _plain_norm(self, x: Value, gamma: Value, node: str) -> Value:
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

    def add_constant(self, stream: Stream, bias: Value, name: str) -> Stream:
        """See `Dialect`."""
        total = stream.base
        for i, term in enumerate((stream.added, stream.bias, bias)):
            if term is not None:
                total = self._recorder.op("Add", [total, term], name=f"/{name.replace('.', '/')}/add_{i}")
        return Stream(total)

    def attention(self, layer: int, dims: LayerDims, x: Value, past: Cache) -> tuple[Value, Cache]:
        """See `Dialect`."""
        base = self._architecture
        assert self._rows and self._rope
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
            qkv: list[Value | None] = [query, key, value]
        else:
            qkv = [self._linear(x, prefix, sizes, base.hidden_size, bias=dims.qkv_bias), None, None]
        inputs = [*qkv, past.key, past.value, self._rows.last_key, self._rows.total, *self._rope]
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

    def mlp(self, layer: int, dims: LayerDims, x: Value) -> Value:
        """See `Dialect`. Gate and up are two products: one would need a Split, which copies what it made."""
        hidden = self._architecture.hidden_size
        prefix, node = f"model.layers.{layer}.mlp", f"/model/layers/{layer}/mlp"
        gate, up = (
            self._linear(x, prefix, {part: dims.ffn_size}, hidden, bias=dims.gate_up_bias)
            for part in ("gate_proj", "up_proj")
        )
        active = self._recorder.op("QuickGelu", [gate], name=f"{node}/silu", domain=_CONTRIB, alpha=1.0)
        gated = self._recorder.op("Mul", [active, up], name=f"{node}/gated")
        return self._linear(gated, prefix, {"down_proj": hidden}, dims.ffn_size, bias=False)

    def head(self, x: Value) -> Value:
        """See `Dialect`."""
        base = self._architecture
        matrix = self._embedding
        assert matrix is not None
        if not base.tied_embeddings:
            name = "lm_head.weight"
            matrix = self._store.matrix(name, [(name, base.vocab_size)], base.hidden_size, encoding=self._head_encoding)
        x = self._from_left(x, "/lm_head/moved_back")
        if self._last_logits:
            last = self._recorder.constant("last", [-1])
            x = self._recorder.op("Gather", [x, last], name="/lm_head/last", axis=1)
        return self._multiply(x, matrix, "/lm_head")

    @property
    def _head_encoding(self) -> Blockwise | None:
        return self._precision.head_of(self._architecture.hidden_size)

    def _head_norm(self, x: Value, name: str, num_heads: int) -> Value:
        """RMSNorm of each head of [batch, sequence, heads * head_dim]."""
        head_dim = self._architecture.head_dim
        node = "/" + name.removesuffix(".weight").replace(".", "/")
        gamma = self._store.vector(name, [(name, head_dim)])
        reshape, constant = self._recorder.op, self._recorder.constant
        heads = reshape("Reshape", [x, constant(f"heads_{head_dim}", [0, -1, head_dim])], name=f"{node}/split")
        normed = self._plain_norm(heads, gamma, node)
        width = num_heads * head_dim
        return reshape("Reshape", [normed, constant(f"width_{width}", [0, -1, width])], name=f"{node}/join")

    def _linear(self, x: Value, prefix: str, parts: dict[str, int], columns: int, *, bias: bool) -> Value:
        """One product for all `parts` (projection: rows), stacked."""
        label = "_".join(part.removesuffix("_proj") for part in parts)
        stored = f"{prefix}.{label}_proj"
        matrix = self._store.matrix(
            f"{stored}.weight",
            [(f"{prefix}.{part}.weight", rows) for part, rows in parts.items()],
            columns,
            encoding=self._precision.linear,
        )
        bias_O = (
            self._store.vector(f"{stored}.bias", [(f"{prefix}.{part}.bias", rows) for part, rows in parts.items()])
            if bias
            else None
        )
        return self._multiply(x, matrix, f"/{stored.replace('.', '/')}", bias_O)

    def _multiply(self, x: Value, matrix: Matrix, node: str, bias_O: Value | None = None) -> Value:
        """The product with `matrix` transposed, plus the bias."""
        weight = self._recorder.stored(matrix.region)
        if matrix.scales is None or matrix.encoding is None:
            product = self._recorder.op("FusedMatMul", [x, weight], name=node, domain=_CONTRIB, transB=1)
            return product if bias_O is None else self._recorder.op("Add", [product, bias_O], name=f"{node}/bias")
        columns, zero_points = matrix.columns, None
        if matrix.zero_points is not None:
            x, zero_points = self._with_sums(x, matrix), self._recorder.stored(matrix.zero_points)
            columns += matrix.encoding.num_blocks(columns)
        inputs: list[Value | None] = [x, weight, self._recorder.stored(matrix.scales), zero_points, None, bias_O]
        while inputs[-1] is None:
            inputs.pop()
        return self._recorder.op(
            "MatMulNBits",
            inputs,
            name=node,
            domain=_CONTRIB,
            K=columns,
            N=matrix.rows,
            bits=matrix.encoding.bits,
            block_size=matrix.encoding.block_size,
            accuracy_level=INT8_ACCURACY,
        )

    def _with_sums(self, x: Value, matrix: Matrix) -> Value:
        """`x` [batch, sequence, in], then the sums of its blocks of channels, which offsets are weights of."""
        assert matrix.encoding is not None
        if x not in self._summed:
            op, constant = self._recorder.op, self._recorder.constant
            size = matrix.encoding.block_size
            split = constant(f"blocks_{matrix.columns}_{size}", [0, 0, matrix.columns // size, size])
            blocks = op("Reshape", [x, split], name=f"{x.name}/blocks")
            sums = op("ReduceSum", [blocks, constant("last_axis", [-1])], name=f"{x.name}/sums", keepdims=0)
            self._summed[x] = op("Concat", [x, sums], name=f"{x.name}/with_sums", axis=-1)
        return self._summed[x]
