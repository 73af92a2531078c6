"""A head that computes logits of some tokens: a smaller product, and a scatter to the places of all tokens.

Token ids stay as they are. Every other token gets the lowest finite number of the logits' type, which a softmax makes 0
as it does minus infinity; differences of two such logits (guidance) and sums with a bias stay numbers.
ScatterElements was the fastest of three ways on a CPU: `dev/LOG.md`, 2026-11-27.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from amoeba_export.formats.onnx.datatype import DataType
from amoeba_export.formats.onnx.graph import Value
from amoeba_export.formats.onnx.names import Names
from amoeba_export.formats.onnx.precision import TORCH_DTYPES
from amoeba_export.formats.onnx.weights import WeightStore
from amoeba_export.ir import Architecture


def even_tokens(count: int | None, vocab_size: int) -> tuple[int, ...] | None:
    """So many tokens, evenly spread over the vocabulary, for a graph whose values do not matter. None for all."""
    return None if count is None else tuple(i * vocab_size // count for i in range(count))


def lowest(dtype: DataType) -> float:
    """The lowest finite number of a type of floats."""
    return float(torch.finfo(TORCH_DTYPES[dtype]).min)


def of_all_tokens(
    logits_BSN: Value, tokens: Sequence[int] | None, base: Architecture, names: Names, store: WeightStore
) -> Value:
    """Logits of `tokens` [batch, sequence, N] at their places in [batch, sequence, vocab]; of None, as they are.

    The stored head gets the rows of `tokens`, of the embedding where both are tied.
    """
    if tokens is None:
        return logits_BSN
    store.take_rows(names.weight("head"), names.weight(base.logits_role), tokens, base.vocab_size)
    op, constant, node = store.recorder.op, store.recorder.constant, names.node("head")
    dtype = store.precision.activation
    places_11N = store.table(names.tokens, np.array(tokens, np.int64)[None, None], DataType.INT64)
    shape = op("Shape", [logits_BSN], name=f"{node}/shape")
    rows = op("Shape", [logits_BSN], name=f"{node}/rows", start=0, end=2)
    whole = op("Concat", [rows, constant("vocabulary", [base.vocab_size])], name=f"{node}/whole_shape", axis=0)
    nowhere_BSV = op("Expand", [constant("lowest", [[[lowest(dtype)]]], dtype), whole], name=f"{node}/lowest")
    places_BSN = op("Expand", [places_11N, shape], name=f"{node}/places")
    return op("ScatterElements", [nowhere_BSV, places_BSN, logits_BSN], name=f"{node}/all", axis=2)
