"""One safetensors file in fp32, written weight by weight: a model need not fit into memory to be unpacked."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import closing
from pathlib import Path

import torch

from amoeba_export.ir import TensorSpec
from amoeba_export.ir.safetensors_header import safetensors_header
from amoeba_export.reserved_file import ReservedFile


def write_weights(
    path: Path, shapes: Mapping[str, tuple[int, ...]], weights: Iterable[tuple[str, torch.Tensor]]
) -> None:
    """Write `weights`, which may come in any order, each of `shapes` once.

    The bytes are those that safetensors' own writer makes: sorted by name, the header padded to 8 bytes.

    Raises:
        DiskFull: The file does not fit.
    """
    specs = [TensorSpec(name=name, shape=shapes[name]) for name in sorted(shapes)]
    dtypes = dict.fromkeys(shapes, torch.float32)
    header, offsets, size_bytes = safetensors_header(specs, dtypes, metadata={"format": "pt"})
    with closing(ReservedFile(path, size_bytes)) as file:
        file.write(header, 0)
        for name, weight in weights:
            assert tuple(weight.shape) == shapes[name], name
            file.write(weight.to(torch.float32).contiguous().numpy().tobytes(), offsets.pop(name))
    assert not offsets, sorted(offsets)
