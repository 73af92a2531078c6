"""What both dialects compute number by number, in the ONNX standard's operators."""

from __future__ import annotations

import math

from amoeba_export.formats.onnx.datatype import DataType
from amoeba_export.formats.onnx.graph import Recorder, Value
from amoeba_export.ir.family import Activation, QueryTemperature

_FP32 = DataType.FLOAT


def scaled(x: Value, factor: float, node: str, recorder: Recorder, dtype: DataType) -> Value:
    """`x` times a number."""
    return recorder.op("Mul", [x, recorder.constant(f"times_{factor!r}", factor, dtype)], name=node)


def capped(x: Value, cap: float, node: str, recorder: Recorder, dtype: DataType) -> Value:
    """Cap * tanh(x / cap)."""
    inner = scaled(x, 1 / cap, f"{node}/inner", recorder, dtype)
    return scaled(recorder.op("Tanh", [inner], name=f"{node}/tanh"), cap, node, recorder, dtype)


def activated(x: Value, activation: Activation, block: str, recorder: Recorder, dtype: DataType) -> Value:
    """The gate of the FFN."""
    op = recorder.op
    if activation == "silu":
        sigmoid = op("Sigmoid", [x], name=f"{block}/sigmoid")
        return op("Mul", [x, sigmoid], name=f"{block}/silu")
    node = f"{block}/{activation}"
    one = recorder.constant("gelu_one", 1.0, dtype)
    # x / 2 * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 x^3)))
    square = op("Mul", [x, x], name=f"{node}/square")
    cubic = op("Mul", [square, recorder.constant("gelu_cubic", 0.044715, dtype)], name=f"{node}/cubic")
    inner = op("Mul", [x, op("Add", [cubic, one], name=f"{node}/grown")], name=f"{node}/inner")
    slope = recorder.constant("gelu_slope", math.sqrt(2 / math.pi), dtype)
    bent = op("Tanh", [op("Mul", [inner, slope], name=f"{node}/angle")], name=f"{node}/tanh")
    half = op("Mul", [x, recorder.constant("gelu_half", 0.5, dtype)], name=f"{node}/half")
    return op("Mul", [half, op("Add", [bent, one], name=f"{node}/share")], name=node)


def temperature(positions: Value, rule: QueryTemperature, recorder: Recorder, dtype: DataType) -> Value:
    """What queries at `positions` (int64) are multiplied by, in the same shape."""
    op, constant = recorder.op, recorder.constant
    wholes = op("Div", [positions, constant("temperature_length", rule.length)], name="/temperature/wholes")
    wide = op("Cast", [wholes], name="/temperature/wholes_fp32", to=int(_FP32))
    one = constant("temperature_one", 1.0, _FP32)
    log = op("Log", [op("Add", [wide, one], name="/temperature/grown")], name="/temperature/log")
    risen = op("Mul", [log, constant("temperature_beta", rule.beta, _FP32)], name="/temperature/risen")
    factor = op("Add", [risen, one], name="/temperature/factor")
    return factor if dtype == _FP32 else op("Cast", [factor], name="/temperature/narrow", to=int(dtype))
