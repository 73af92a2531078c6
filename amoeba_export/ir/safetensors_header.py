"""The header of a safetensors file: written before the first weight, so that weights can be streamed.

The library writes whole dictionaries of tensors from memory only.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from amoeba_export.ir.dtype import FLOATS, float_name
from amoeba_export.ir.subnet import TensorSpec

if TYPE_CHECKING:
    import torch


_INTEGERS = {"torch.uint8": "U8", "torch.int32": "I32", "torch.int64": "I64"}


def safetensors_header(
    specs: Iterable[TensorSpec], dtypes: Mapping[str, torch.dtype], *, metadata: Mapping[str, str]
) -> tuple[bytes, dict[str, int], int]:
    """The header for weights in this order, without gaps.

    Args:
        specs: Names and shapes.
        dtypes: Of each of them, by name.
        metadata: Texts that go with the file.

    Returns:
        The header, the offset of each weight in the file, and the size of the whole file.
    """
    table: dict[str, Any] = {"__metadata__": dict(metadata)}
    offsets, position = {}, 0
    for spec in specs:
        dtype = dtypes[spec.name]
        end = position + math.prod(spec.shape) * dtype.itemsize
        kind = _INTEGERS.get(str(dtype)) or FLOATS[float_name(dtype)].safetensors_name
        table[spec.name] = {"dtype": kind, "shape": list(spec.shape), "data_offsets": [position, end]}
        offsets[spec.name], position = position, end
    text = json.dumps(table, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    header = len(text).to_bytes(8, "little") + text
    return header, {name: len(header) + offset for name, offset in offsets.items()}, len(header) + position
