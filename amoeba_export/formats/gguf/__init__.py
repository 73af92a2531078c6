"""GGUF for llama.cpp: one file, written through the `gguf` package's header and straight to each tensor's place.

`layout.py` says which architecture of llama.cpp computes a plan and what it needs besides the plan's weights,
`tokenizer.py` writes the vocabulary, `writer.py` the file.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

from amoeba_export.errors import NotRepresentable
from amoeba_export.formats.config import check_family, check_features
from amoeba_export.formats.gguf.layout import choose_architecture, written_layers
from amoeba_export.formats.gguf.writer import QUANTIZATIONS, GgufWriter, tensor_bytes, tensor_type
from amoeba_export.formats.sizes import WeightBytes, sum_bytes
from amoeba_export.ir import DenseArchitecture, Subnet
from amoeba_export.ir.dtype import DTYPES
from amoeba_export.ir.family import Feature

default_dtype = "fp16"
dtypes = tuple(QUANTIZATIONS)

COMPUTES: frozenset[Feature] = frozenset()
"""What is written here beyond Llama's layer."""


def check(dense: DenseArchitecture, *, dtype: str) -> None:
    """Raise `NotRepresentable` when no architecture of llama.cpp computes `dense`, or `dtype` is not a GGUF type."""
    check_family(dense)
    check_features("GGUF", dense, COMPUTES)
    if dtype not in QUANTIZATIONS:
        raise NotRepresentable(
            "GGUF", f"{dtype} is not one of its types", [f"--dtype {known}" for known in QUANTIZATIONS]
        )
    choose_architecture(dense)


def weight_bytes(dense: DenseArchitecture, *, dtype: str) -> WeightBytes:
    """See `Format`. What llama.cpp or a quantized row needs besides the plan's weights is in it."""
    layers = written_layers(dense, choose_architecture(dense), quantized=DTYPES[dtype].is_quantized)

    def matrix(name: str, rows: int, columns: int) -> int:
        return tensor_bytes((rows, columns), tensor_type(dtype, name, (rows, columns)))

    return sum_bytes(
        DenseArchitecture(base=dense.base, layers=layers),
        matrix=partial(matrix, ""),
        head=partial(matrix, "output.weight"),
        vector_bytes=DTYPES["fp32"].bits // 8,
    )


def open_writer(subnet: Subnet, folder: Path, *, dtype: str = default_dtype) -> GgufWriter:
    """Start writing `subnet` as `model.gguf`.

    Args:
        subnet: The cut model.
        folder: Where the file goes.
        dtype: `fp32`, `fp16`, `bf16`; `int8` is Q8_0, `int4` is Q4_0 with embeddings and output in Q8_0.

    Raises:
        NotRepresentable: See `check`; or the tokenizer is one that llama.cpp does not know.
        DiskFull: The file will not fit.
    """
    check(subnet.architecture, dtype=dtype)
    return GgufWriter(subnet, folder, dtype=dtype)
