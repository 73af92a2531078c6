"""Left padding, moved to the right end of rows and back.

GroupQueryAttention takes the number of keys of each row and knows no other padding than at the right.
"""

from __future__ import annotations

from dataclasses import dataclass

from amoeba_export.formats.onnx.datatype import DataType
from amoeba_export.formats.onnx.graph import Recorder, Value


@dataclass(frozen=True, slots=True, kw_only=True)
class Rows:
    """What is known of the rows of a batch.

    Attributes:
        tokens: Tokens of each row, those in the cache included [batch].
        last_key: The same less one, int32 [batch].
        total: Length of the mask, int32 [1].
        reach: Positions of each row, from its first token to the end of the mask [batch].
        new: New positions of each row, from its first token on [batch].
        width: New positions, padding included [1].
        length: The same for each row [batch].
    """

    tokens: Value
    last_key: Value
    total: Value
    reach: Value
    new: Value
    width: Value
    length: Value


def rows_of(input_ids: Value, attention_mask: Value, recorder: Recorder) -> Rows:
    """A row of the mask is left padding, then tokens, then maybe right padding."""
    op, constant = recorder.op, recorder.constant
    tokens_B = op("ReduceSum", [attention_mask, constant("axis_1", [1])], name="/mask/tokens", keepdims=0)
    last_B = op("Sub", [tokens_B, constant("one", 1)], name="/mask/last")
    last_i32 = op("Cast", [last_B], name="/mask/last_i32", to=int(DataType.INT32))
    total = op("Shape", [attention_mask], name="/mask/total", start=1)
    total_i32 = op("Cast", [total], name="/mask/total_i32", to=int(DataType.INT32))
    # The mask is as long as the cache and the new tokens: from a row's first token to its end are its new
    # positions, or more, when it began in the cache.
    padding_B = op("ArgMax", [attention_mask], name="/mask/padding", axis=1, keepdims=0)
    reach_B = op("Sub", [total, padding_B], name="/mask/reach")
    width = op("Shape", [input_ids], name="/mask/length", start=1)
    new_B = op("Min", [reach_B, width], name="/mask/new")
    return Rows(
        tokens=tokens_B,
        last_key=last_i32,
        total=total_i32,
        reach=reach_B,
        new=new_B,
        width=width,
        length=op("Max", [new_B, width], name="/mask/lengths"),
    )


def to_left(x: Value, rows: Rows, name: str, recorder: Recorder, dtype: DataType) -> Value:
    """`x` [batch, sequence, hidden], the left padding of each row moved to its right end.

    Each row is reversed, and then what is no left padding once more.
    """
    return _reversed_twice(x, (rows.length, rows.new), name, recorder, dtype)


def from_left(x: Value, rows: Rows, name: str, recorder: Recorder, dtype: DataType) -> Value:
    """The inverse of `to_left`."""
    return _reversed_twice(x, (rows.new, rows.length), name, recorder, dtype)


def _reversed_twice(x: Value, counts: tuple[Value, Value], name: str, recorder: Recorder, dtype: DataType) -> Value:
    """`x` with the first positions of each row reversed: as many as the first count [batch], then as the second."""
    op = recorder.op
    # onnxruntime's CUDA provider takes the node with bfloat16, and fails when it runs.
    as_fp32 = dtype == DataType.BFLOAT16
    if as_fp32:
        x = op("Cast", [x], name=f"{name}/fp32", to=int(DataType.FLOAT))
    for suffix, count_B in zip(("/first", "/second"), counts, strict=True):
        x = op("ReverseSequence", [x, count_B], name=name + suffix, batch_axis=0, time_axis=1)
    return op("Cast", [x], name=f"{name}/bf16", to=int(DataType.BFLOAT16)) if as_fp32 else x
