"""Which keys a query sees, as what is added to its scores: what is not padding, not after it, not before its window."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from amoeba_export.formats.onnx.datatype import DataType
from amoeba_export.formats.onnx.graph import Recorder, Value

_LOWEST = float(torch.finfo(torch.float32).min)
"""Added to the score of a key that must not be seen. Finite, so that a row that sees nothing is not NaN."""


def score_biases(
    attention_mask: Value, past: Value, total: Value, windows: Sequence[int | None], recorder: Recorder
) -> Mapping[int | None, Value]:
    """By window: what is added to the scores in fp32, [batch, 1, sequence, total].

    Args:
        attention_mask: [batch, total], 0 for padding.
        past: Positions in the cache.
        total: Those, and the new ones.
        windows: The windows of the layers, None for no window.
        recorder: Of the graph.
    """
    op, constant = recorder.op, recorder.constant
    keys_T = op("Range", [constant("zero", 0), total, constant("one", 1)], name="/mask/keys")
    query_S = op("Range", [past, total, constant("one", 1)], name="/mask/query")
    query_S1 = op("Unsqueeze", [query_S, constant("axis_1", [1])], name="/mask/query_column")
    visible_ST = op("LessOrEqual", [keys_T, query_S1], name="/mask/causal")
    tails = {window: "" if len(windows) == 1 else f"_{window or 'all'}" for window in windows}
    seen = {window: _in_window(visible_ST, keys_T, query_S1, window, tails[window], recorder) for window in windows}
    real_BT = op("Cast", [attention_mask], name="/mask/real", to=int(DataType.BOOL))
    real_B11T = op("Unsqueeze", [real_BT, constant("axes_12", [1, 2])], name="/mask/real_4d")
    biases = {}
    for window, seen_ST in seen.items():
        visible_B1ST = op("And", [real_B11T, seen_ST], name=f"/mask/visible{tails[window]}")
        shown, hidden = constant("shown", 0.0, DataType.FLOAT), constant("hidden", _LOWEST, DataType.FLOAT)
        biases[window] = op("Where", [visible_B1ST, shown, hidden], name=f"/mask/bias{tails[window]}")
    return biases


def _in_window(
    visible_ST: Value, keys_T: Value, query_S1: Value, window: int | None, tail: str, recorder: Recorder
) -> Value:
    """What is visible and lies in a window. `tail` tells the masks of several windows apart."""
    if not window:
        return visible_ST
    op = recorder.op
    size = recorder.constant(f"window{tail}", window)
    oldest_S1 = op("Sub", [query_S1, size], name=f"/mask/before_window{tail}")
    in_window_ST = op("Greater", [keys_T, oldest_S1], name=f"/mask/in_window{tail}")
    return op("And", [visible_ST, in_window_ST], name=f"/mask/causal_window{tail}")
