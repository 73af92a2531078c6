"""One safetensors file in fp32, written weight by weight: a model need not fit into memory to be unpacked."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch

from amoeba_export.errors import DiskFull


def write_weights(
    path: Path, shapes: Mapping[str, tuple[int, ...]], weights: Iterable[tuple[str, torch.Tensor]]
) -> None:
    """Write `weights`, which may come in any order, each of `shapes` once.

    The bytes are those that safetensors' own writer makes: sorted by name, the header padded to 8 bytes.

    Raises:
        DiskFull: The file does not fit.
    """
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offsets: dict[str, int] = {}
    position = 0
    for name in sorted(shapes):
        size_bytes = 4 * math.prod(shapes[name])
        header[name] = {
            "dtype": "F32",
            "shape": list(shapes[name]),
            "data_offsets": [position, position + size_bytes],
        }
        offsets[name] = position
        position += size_bytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    start = 8 + len(text)
    free_bytes = shutil.disk_usage(path.parent).free
    if free_bytes < start + position:
        raise DiskFull(path.parent, start + position, free_bytes)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, weight in weights:
            assert tuple(weight.shape) == shapes[name], name
            file.seek(start + offsets.pop(name))
            file.write(weight.to(torch.float32).contiguous().numpy().tobytes())
    assert not offsets, sorted(offsets)
