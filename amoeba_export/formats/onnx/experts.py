"""An FFN of experts, in the ONNX standard's operators, the same for both dialects.

A Loop runs over the experts that any token picked: it takes the matrices of one, and the tokens that picked it. A step
of decode reads the experts of its tokens and no others; a long prompt holds the matrices of no more than one expert
beside the stored ones. The cost is a copy of each expert that runs, and an iteration for it.

T tokens, K experts of a token, U experts picked by any, n tokens of one expert, D hidden, F neurons of an expert.
"""

from __future__ import annotations

from amoeba_export.formats.onnx.datatype import DataType
from amoeba_export.formats.onnx.elementwise import activated
from amoeba_export.formats.onnx.graph import Recorder, Value
from amoeba_export.formats.onnx.names import Names
from amoeba_export.formats.onnx.weights import WeightStore
from amoeba_export.ir import Architecture

_FP32 = DataType.FLOAT


def experts(
    x: Value, layer: int, num_experts: int, base: Architecture, names: Names, recorder: Recorder, store: WeightStore
) -> Value:
    """The sum of what each token's experts give, by their shares; `x` is [batch, sequence, hidden]."""
    op, constant, hidden = recorder.op, recorder.constant, base.hidden_size
    node = names.block("down", layer)
    x_TD = op("Reshape", [x, constant(f"rows_{hidden}", [-1, hidden])], name=f"{node}/tokens")
    share_TK, picked_TK = _routed(x_TD, layer, num_experts, base, names, recorder, store)
    size = base.unit_size
    gates = store.experts(names.weight("gate", layer), num_experts, size, hidden, dim=0)
    ups = store.experts(names.weight("up", layer), num_experts, size, hidden, dim=0)
    downs = store.experts(names.weight("down", layer), num_experts, hidden, size, dim=1)
    used_U, *_ = recorder.ops("Unique", [picked_TK], name=f"{node}/used", outputs=["", None, None, None])

    inner = recorder.inner()
    op = inner.op
    step = inner.input(f"{node}/step", DataType.INT64, ())
    goes_on = inner.input(f"{node}/goes_on", DataType.BOOL, ())
    before_TD = inner.input(f"{node}/before", _FP32, ("tokens", hidden))
    expert = op("Gather", [used_U, step], name=f"{node}/expert")
    here_TK = op("Equal", [picked_TK, expert], name=f"{node}/here")
    places_2n = op("NonZero", [here_TK], name=f"{node}/places")
    places_n2 = op("Transpose", [places_2n], name=f"{node}/places_rows", perm=[1, 0])
    tokens_n = op("Gather", [places_2n, constant("zero", 0)], name=f"{node}/own", axis=0)
    axis_1 = constant("axis_1", [1])
    x_nD = op("Gather", [x_TD, tokens_n], name=f"{node}/own_tokens", axis=0)
    share_n = op("GatherND", [share_TK, places_n2], name=f"{node}/own_shares")
    share_n1 = op("Unsqueeze", [share_n, axis_1], name=f"{node}/own_shares_column")

    def product(entering: Value, matrices: Value, label: str) -> Value:
        matrix = op("Gather", [matrices, expert], name=f"{node}/{label}_matrix", axis=0)
        return op("Gemm", [entering, matrix], name=f"{node}/{label}", transB=1)

    gate_nF, up_nF = product(x_nD, gates, "gate_of_one"), product(x_nD, ups, "up_of_one")
    active_nF = activated(gate_nF, base.activation, node, inner, store.precision.activation)
    made_nD = product(op("Mul", [active_nF, up_nF], name=f"{node}/gated"), downs, "down_of_one")
    wide_nD = _cast(made_nD, _FP32, f"{node}/made", inner, store)
    given_nD = op("Mul", [wide_nD, share_n1], name=f"{node}/given")
    tokens_n1 = op("Unsqueeze", [tokens_n, axis_1], name=f"{node}/own_column")
    after_TD = op("ScatterND", [before_TD, tokens_n1, given_nD], name=f"{node}/sum", reduction="add")
    inner.output(op("Identity", [goes_on], name=f"{node}/on"), f"{node}/goes_on_after", DataType.BOOL, ())
    inner.output(after_TD, f"{node}/after", _FP32, ("tokens", hidden))

    op = recorder.op
    shape = op("Shape", [x_TD], name=f"{node}/tokens_shape")
    nothing_TD = op("Expand", [constant("nothing", 0.0, _FP32), shape], name=f"{node}/nothing")
    count, always = op("Size", [used_U], name=f"{node}/count"), constant("always", True, DataType.BOOL)
    total_TD = op("Loop", [count, always, nothing_TD], name=f"{node}/experts", body=inner)
    narrow_TD = _cast(total_TD, store.precision.activation, f"{node}/narrow", recorder, store)
    return op("Reshape", [narrow_TD, op("Shape", [x], name=f"{node}/shape")], name=f"{node}/mixed")


def _routed(
    x_TD: Value, layer: int, num_experts: int, base: Architecture, names: Names, recorder: Recorder, store: WeightStore
) -> tuple[Value, Value]:
    """Shares, in fp32, and the experts that have them. Both [T, K]."""
    op, constant = recorder.op, recorder.constant
    name, node = names.weight("router", layer), names.node("router", layer)
    matrix = store.matrix(name, [(name, num_experts)], base.hidden_size, encoding=None)
    scores_TE = op("Gemm", [x_TD, recorder.stored(matrix.region)], name=node, transB=1)
    wide_TE = _cast(scores_TE, _FP32, f"{node}/fp32", recorder, store)
    shares_TE = op("Softmax", [wide_TE], name=f"{node}/shares", axis=-1)
    count = constant(f"best_{base.picked_of(num_experts)}", [base.picked_of(num_experts)])
    share_TK, picked_TK = recorder.ops("TopK", [shares_TE, count], name=f"{node}/best", outputs=["", "_of"], axis=-1)
    if base.shares_sum_to_one:
        total_T1 = op("ReduceSum", [share_TK, constant("last_axis", [-1])], name=f"{node}/total", keepdims=1)
        share_TK = op("Div", [share_TK, total_T1], name=f"{node}/share")
    return share_TK, picked_TK


def _cast(x: Value, dtype: DataType, node: str, recorder: Recorder, store: WeightStore) -> Value:
    """`x` in another float than activations have, or from that back."""
    return x if store.precision.activation == _FP32 else recorder.op("Cast", [x], name=node, to=int(dtype))
