"""A file without weights, for timing: the header, and where weights go that are made where the file is measured.

llama.cpp loads no model without a vocabulary and runs none without a tokenizer. So it has words without a meaning,
one for each row of the embedding: its tokenizer is not asked, prompts are numbers.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf

from amoeba_export.formats.gguf.writer import MODEL_NAME, lay_out, tensor_bytes
from amoeba_export.ir import DenseArchitecture

HEADER_NAME = "header.gguf"

_Type = gguf.GGMLQuantizationType
_FLOATS = {_Type.F32: "fp32", _Type.F16: "fp16", _Type.BF16: "bf16"}

_SCALES: dict[gguf.GGMLQuantizationType, tuple[int, ...]] = {
    _Type.Q8_0: (0,),
    _Type.Q4_0: (0,),
    _Type.Q5_0: (0,),
    _Type.Q5_1: (0, 2),
    _Type.Q4_K: (0, 2),
    _Type.Q5_K: (0, 2),
    _Type.Q6_K: (208,),
}
"""Where in a block its fp16 scales lie, as in ggml-common.h. The rest are integers."""


def write_random(dense: DenseArchitecture, folder: Path, *, dtype: str) -> dict[str, Any]:
    """Write `header.gguf`, and say what makes `model.gguf` of it: the runner's `weights`.

    Raises:
        NotRepresentable: See `check`.
    """
    placed = lay_out(
        folder / MODEL_NAME,
        dense,
        dtype=dtype,
        name="random weights",
        add_vocabulary=lambda header: _add_words(header, dense.base.vocab_size),
    )
    (folder / HEADER_NAME).write_bytes(placed.header)
    regions = [
        {"offset": placed.data_start + position, "length": tensor_bytes(shape, kind), **_filling(name, kind)}
        for name, (shape, kind, position) in placed.tensors.items()
    ]
    return {"file": MODEL_NAME, "head": HEADER_NAME, "regions": regions}


def _filling(name: str, kind: gguf.GGMLQuantizationType) -> dict[str, Any]:
    if name == "rope_freqs.weight":  # angles are divided by it
        return {"dtype": "ones"}
    if kind in _FLOATS:
        return {"dtype": _FLOATS[kind]}
    return {"dtype": "bytes", "period": gguf.GGML_QUANT_SIZES[kind][1], "scales": _SCALES[kind]}


def _add_words(header: gguf.GGUFWriter, count: int) -> None:
    header.add_tokenizer_model("llama")
    header.add_tokenizer_pre("default")
    header.add_token_list([f"t{idx}" for idx in range(count)])
    header.add_token_scores([0.0] * count)
    header.add_token_types([int(gguf.TokenType.NORMAL)] * count)
