"""Products with stored matrices, in the operators that onnxruntime has for them."""

from __future__ import annotations

from amoeba_export.formats.onnx.graph import Recorder, Value
from amoeba_export.formats.onnx.weights import Matrix

CONTRIB = "com.microsoft"
"""Domain of onnxruntime's own operators."""

INT8_ACCURACY = 4
"""`accuracy_level` of MatMulNBits: activations in int8 blocks, the fastest kernels on every CPU."""


class Products:
    """Rows of matrices [out, in], and products with their transposes. Sums of blocks are made once per input."""

    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder
        self._summed: dict[Value, Value] = {}

    def look_up(self, matrix: Matrix, ids: Value, node: str) -> Value:
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
            domain=CONTRIB,
            bits=matrix.encoding.bits,
            block_size=matrix.encoding.block_size,
            gather_axis=0,
            quantize_axis=1,
        )

    def multiply(self, x: Value, matrix: Matrix, node: str, bias_O: Value | None = None) -> Value:
        """The product with `matrix` transposed, plus the bias."""
        weight = self._recorder.stored(matrix.region)
        if matrix.scales is None or matrix.encoding is None:
            product = self._recorder.op("FusedMatMul", [x, weight], name=node, domain=CONTRIB, transB=1)
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
            domain=CONTRIB,
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
