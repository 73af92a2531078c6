"""ONNX, emitted node by node: no tracing, no model object, one weight in memory at a time (a block's with int4).

A folder gets `model.onnx` (the graph), `model.onnx.data` (the weights), the tokenizer, `config.json` for optimum, and
`genai_config.json` for the runtime of onnxruntime-genai. `decoder.py` is the walk over layers, `ort.py` and
`standard.py` are the operators it is written in, `weights.py` is how each weight is stored.
"""

from __future__ import annotations

import json
from pathlib import Path

from amoeba_export.errors import NotRepresentable, UnknownName
from amoeba_export.formats.config import graph_config
from amoeba_export.formats.model_type import check_family
from amoeba_export.formats.onnx.genai import genai_config
from amoeba_export.formats.onnx.ort import HEAD_MULTIPLE
from amoeba_export.formats.onnx.precision import PRECISIONS
from amoeba_export.formats.onnx.rope import TABULATED_TYPES, rope_rows, rope_type
from amoeba_export.formats.onnx.turns import turned_by
from amoeba_export.formats.onnx.vocabulary import even_tokens
from amoeba_export.formats.onnx.writer import DIALECTS, OnnxWriter, Spelling, spelled_dialect
from amoeba_export.formats.sidecars import copy_generation_config, copy_license, copy_tokenizer
from amoeba_export.formats.sizes import WeightBytes, sum_bytes
from amoeba_export.ir import Architecture, ContainerLimits, DenseArchitecture, Subnet, TensorSource
from amoeba_export.ir.dtype import DTYPES
from amoeba_export.load.family_file import read_family

default_dtype = "fp32"
dtypes = tuple(PRECISIONS)


def check(dense: DenseArchitecture, *, dtype: str, dialect: str = "ort") -> None:
    """Raise `NotRepresentable` when no graph of `dialect` computes `dense` in `dtype`.

    Any mix of layer widths, blocks without heads or neurons, and biases is fine.
    """
    check_family(dense)
    if dialect not in DIALECTS:
        raise UnknownName("ONNX dialect", dialect, DIALECTS)
    if dtype not in PRECISIONS:
        raise NotRepresentable("ONNX", f"{dtype} is not one of its dtypes", [f"--dtype {name}" for name in PRECISIONS])
    if spelled_dialect(dense, dialect) != dialect and PRECISIONS[dtype].linear:
        raise NotRepresentable(
            "ONNX",
            f"onnxruntime's attention takes heads of a multiple of {HEAD_MULTIPLE}, these have {dense.base.head_dim}, "
            f"and without it there are no {dtype} weights"
            if dense.base.head_dim % HEAD_MULTIPLE
            else f"onnxruntime's attention turns multiples of {HEAD_MULTIPLE} dims of a head, and without it there are "
            f"no {dtype} weights",
            ("--dtype fp16", "--dtype fp32", f"--format gguf --dtype {dtype}"),
        )
    if PRECISIONS[dtype].linear and dense.base.expert_size:
        raise NotRepresentable(
            "ONNX",
            f"{dtype} weights of experts are not written yet",
            ("--dtype fp16", "--dtype fp32", f"--format gguf --dtype {dtype}"),
        )
    linear, hidden_size = PRECISIONS[dtype].linear, dense.base.hidden_size
    if linear and linear.has_offsets and hidden_size % linear.block_size:
        raise NotRepresentable(
            f"{dtype} in ONNX",
            f"the hidden size {hidden_size} is no multiple of {linear.block_size}, the size of its blocks",
            ("--dtype int4", "--dtype int8"),
        )
    if dialect == "standard" and PRECISIONS[dtype].linear:
        raise NotRepresentable(
            "ONNX without onnxruntime's operators",
            f"{dtype} weights need MatMulNBits",
            ("the dialect ort", "--dtype fp16", "--dtype fp32"),
        )
    for rope in turned_by(dense).values():
        if rope_type(rope) not in TABULATED_TYPES:
            raise NotRepresentable(
                "ONNX",
                f"the angles of its RoPE ({rope_type(rope)}) change with the length of the sequence",
                ("--format safetensors",),
            )


def limits(base: Architecture) -> ContainerLimits:
    """See `Format`: none."""
    return ContainerLimits(container="ONNX")


def weight_bytes(dense: DenseArchitecture, *, dtype: str) -> WeightBytes:
    """See `Format`. Cosines and sines of every position are in the file too."""
    precision, base = PRECISIONS[dtype], dense.base
    number = precision.activation.bitwidth // 8
    head = precision.head_of(base.hidden_size)
    return sum_bytes(
        dense,
        matrix=lambda rows, columns: precision.matrix_bytes(rows, columns, precision.linear),
        head=lambda rows, columns: precision.matrix_bytes(rows, columns, head),
        vector_bytes=number,
        tables=sum(rope_rows(rope, base.max_positions) * rope.dims * number for rope in turned_by(dense).values()),
    )


def open_writer(
    subnet: Subnet,
    folder: Path,
    *,
    dtype: str = default_dtype,
    dialect: str = "ort",
    last_logits: bool = False,
    rounded: TensorSource | None = None,
) -> OnnxWriter:
    """Write everything but weights and graph, reserve the space of the weights, and return the writer that takes them.

    Args:
        subnet: The cut model.
        folder: Where the files go.
        dtype: `fp32`, `fp16`, `bf16`; `int8`, `int4-mixed` and `int4` quantize weights only.
        dialect: `ort` for onnxruntime (CPU, CUDA), `standard` for everything else. A model whose heads onnxruntime's
            attention does not take is written in `standard`, which onnxruntime runs too.
        last_logits: Compute the logits of the last position only: `logits` is [batch, 1, vocab].
        rounded: Weights that are written in place of those given: on grids that `dtype` holds, and keeps.

    Raises:
        NotRepresentable: As `check`; or from `accept`, when a weight is too large for fp16.
        DiskFull: The files do not fit on the disk.
    """
    dense = subnet.architecture
    check(dense, dtype=dtype, dialect=dialect)
    spelling = Spelling(
        dtype=dtype,
        dialect=spelled_dialect(dense, dialect),
        last_logits=last_logits,
        head_tokens=subnet.plan.head_tokens,
    )
    writer = OnnxWriter(dense, subnet.family, folder, spelling, rounded=rounded)
    _write_json(graph_config(subnet, dtype=DTYPES[dtype].torch_name), folder / "config.json")
    if dialect == "ort":
        _write_json(genai_config(dense, subnet.source_folder), folder / "genai_config.json")
    copy_tokenizer(subnet, folder)
    copy_generation_config(subnet.source_folder, folder)
    copy_license(subnet.source_folder, folder)
    return writer


def write_random(
    dense: DenseArchitecture,
    folder: Path,
    *,
    dtype: str = default_dtype,
    dialect: str = "ort",
    last_logits: bool = False,
    seed: int = 0,
) -> None:
    """Write a model of these dims with random weights and nothing beside it: for timing.

    The graph is that of `open_writer`, to the byte. Arguments and errors as there.
    """
    check(dense, dtype=dtype, dialect=dialect)
    spelling = Spelling(
        dtype=dtype,
        dialect=spelled_dialect(dense, dialect),
        last_logits=last_logits,
        head_tokens=even_tokens(dense.base.head_rows, dense.base.vocab_size),
    )
    OnnxWriter(dense, read_family(dense.base.family).family, folder, spelling).close_random(seed)


def _write_json(content: object, path: Path) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
