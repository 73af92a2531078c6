"""Which type each tensor has in llama.cpp's mixtures, as its `src/llama-quant.cpp` chooses.

`Q4_K_M` and `Q5_K_M` give some layers' v and down 6 bits. Rows that are no whole super-blocks of 256 get a type of
blocks of 32 with more bits. Not applied: what llama.cpp does for models of 80 layers and of 8 experts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType

import gguf

from amoeba_export.ir import LayerDims

_Type = gguf.GGMLQuantizationType

K_QUANTS: Mapping[str, gguf.GGMLQuantizationType] = MappingProxyType(
    {"q6_k": _Type.Q6_K, "q5_k_m": _Type.Q5_K, "q4_k_m": _Type.Q4_K}
)
"""`--dtype` -> the type that most matrices have."""

_SMALLER_BLOCKS = {_Type.Q4_K: _Type.Q5_0, _Type.Q5_K: _Type.Q5_1, _Type.Q6_K: _Type.Q8_0}

_BETTER = _Type.Q6_K
_WITH_V = {_Type.Q4_K: _Type.Q5_K, _Type.Q5_K: _Type.Q6_K}


def k_quant_type(
    dtype: str, name: str, columns: int, layers: Sequence[LayerDims], *, tied: bool
) -> gguf.GGMLQuantizationType:
    """The type of a matrix.

    Args:
        dtype: A key of `K_QUANTS`.
        name: Of the tensor.
        columns: Of a row.
        layers: Of the file.
        tied: Whether the embedding is the head, too.
    """
    kind = K_QUANTS[dtype]
    if name == "output.weight" or (name == "token_embd.weight" and tied):
        kind = _BETTER if columns % _block(kind) == 0 else _Type.Q8_0
    elif name.endswith((".attn_v.weight", ".ffn_down.weight", ".ffn_down_exps.weight")) and dtype != "q6_k":
        idx, count = int(name.split(".")[1]), len(layers)
        if name.endswith(".attn_v.weight"):  # counted among the layers that have attention
            idx, count = sum(one.num_heads > 0 for one in layers[:idx]), sum(one.num_heads > 0 for one in layers)
        if idx < count // 8 or idx >= 7 * count // 8 or (idx - count // 8) % 3 == 2:
            kind = _BETTER
    elif name.endswith(".attn_qkv.weight"):  # v is in it
        kind = _WITH_V.get(kind, kind)
    if columns % _block(kind):
        kind = _SMALLER_BLOCKS.get(kind, kind)
    return kind if columns % _block(kind) == 0 else _Type.F16


def _block(kind: gguf.GGMLQuantizationType) -> int:
    size: int = gguf.GGML_QUANT_SIZES[kind][0]
    return size
