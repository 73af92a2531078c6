"""ONNX, emitted node by node: no tracing, no model object, one weight in memory at a time.

A folder gets `model.onnx` (the graph) and `model.onnx.data` (the weights). `decoder.py` is the walk over layers,
`ort.py` and `standard.py` the operators it is written in, `weights.py` how each weight is stored.
"""

from __future__ import annotations

from pathlib import Path

from amoeba_export.errors import NotRepresentable, UnknownName
from amoeba_export.formats.onnx.precision import PRECISIONS
from amoeba_export.formats.onnx.rope import TABULATED_TYPES, rope_type
from amoeba_export.formats.onnx.writer import DIALECTS, OnnxWriter, record_model
from amoeba_export.ir import DenseArchitecture, Subnet

default_dtype = "fp32"
dtypes = tuple(PRECISIONS)


def check(dense: DenseArchitecture, *, dtype: str, dialect: str = "ort") -> None:
    """Raise `NotRepresentable` when no graph of `dialect` computes `dense` in `dtype`.

    Any mix of layer widths, blocks without heads or neurons, and biases is fine.
    """
    if dtype not in PRECISIONS:
        raise UnknownName("ONNX dtype", dtype, PRECISIONS)
    if dialect not in DIALECTS:
        raise UnknownName("ONNX dialect", dialect, DIALECTS)
    if rope_type(dense.base) not in TABULATED_TYPES:
        raise NotRepresentable(
            "ONNX",
            f"the angles of its RoPE ({rope_type(dense.base)}) change with the length of the sequence",
            ["--format safetensors", "--format gguf"],
        )
    activation = dense.base.config.get("hidden_act", "silu")
    if activation not in ("silu", "swish"):
        raise NotRepresentable("ONNX", f"its activation is {activation}, not silu", ["--format safetensors"])


def open_writer(
    subnet: Subnet,
    folder: Path,
    *,
    dtype: str,
    dialect: str = "ort",
    left_padding: bool = True,
    last_logits: bool = False,
) -> OnnxWriter:
    """Start writing `subnet` as `model.onnx` and `model.onnx.data`.

    Args:
        subnet: The cut model.
        folder: Where the files go.
        dtype: `fp32`, `fp16`, `bf16`; `int8` and `int4` quantize weights only.
        dialect: `ort` for onnxruntime (CPU, CUDA), `standard` for everything else.
        left_padding: Mask padding at the left of a row. Of onnxruntime's providers only CPU and WebGPU can; without
            it, rows of a batch may be padded at the right alone.
        last_logits: Compute the logits of the last position only: `logits` is [batch, 1, vocab].

    Raises:
        NotRepresentable: See `check`.
        DiskFull: The files will not fit.
    """
    check(subnet.architecture, dtype=dtype, dialect=dialect)
    model, store = record_model(
        subnet.architecture, PRECISIONS[dtype], dialect=dialect, left_padding=left_padding, last_logits=last_logits
    )
    return OnnxWriter(model, store, folder)


def write_random(
    dense: DenseArchitecture,
    folder: Path,
    *,
    dtype: str,
    seed: int = 0,
    dialect: str = "ort",
    left_padding: bool = True,
    last_logits: bool = False,
) -> None:
    """Write a model of these dims with random weights, the same graph as `open_writer` would: for timing.

    Arguments and errors as in `open_writer`.
    """
    check(dense, dtype=dtype, dialect=dialect)
    model, store = record_model(
        dense, PRECISIONS[dtype], dialect=dialect, left_padding=left_padding, last_logits=last_logits
    )
    OnnxWriter(model, store, folder).close_random(seed)
