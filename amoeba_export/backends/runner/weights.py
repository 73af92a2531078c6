"""Weights files made where they are measured: random ones for graphs that came without, and fresh copies."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

BLOCK = 1 << 20
"""Elements of the random block that is repeated. Larger than any L2 cache, so that no runtime profits from it."""

STRIDE = 4 * 10007
"""Bytes between the places in the block at which consecutive weights start. No two weights of a model may be equal:
ONNX Runtime keeps one packed copy of equal ones, and a model that fits the cache runs twice as fast as it should."""


def write_weights(path: str, regions: Sequence[Mapping[str, Any]], *, seed: int = 0) -> None:
    """Write the weights file `path` with random values.

    Floats are normal with a deviation of 0.02, as in a trained model: zeros would draw less power than real weights
    and, on a device with a power limit, run faster; denormal numbers would run slower. Integers are uniform.

    Args:
        path: The file; it is replaced.
        regions: `offset`, `length` in bytes and `dtype` of every weight.
        seed: Of the values.
    """
    blocks: dict[str, memoryview] = {}
    rng = np.random.default_rng(seed)
    with open(path, "wb") as file:  # noqa: PTH123 - runs on devices, where startup counts
        file.truncate(max((region["offset"] + region["length"] for region in regions), default=0))
        for number, region in enumerate(regions):
            dtype = region["dtype"]
            if dtype not in blocks:
                blocks[dtype] = memoryview(_random(dtype, rng)).cast("B")
            block, left = blocks[dtype], region["length"]
            start = number * STRIDE % len(block)
            file.seek(region["offset"])
            while left > 0:
                piece = block[start : start + left]
                left -= file.write(piece)
                start = (start + len(piece)) % len(block)


def copy_files(source: str, folder: str) -> None:
    """Copy the files of `source` into `folder`, written in the way of random weights."""
    for entry in os.scandir(source):
        if not entry.is_file():
            continue
        target = os.path.join(folder, entry.name)  # noqa: PTH118 - as above
        with open(entry.path, "rb") as file, open(target, "wb") as copy:  # noqa: PTH123 - as above
            while piece := file.read(4 * BLOCK):
                copy.write(piece)


def remove_weights(path: str) -> None:
    """Delete what `write_weights` wrote, if it is there."""
    if os.path.exists(path):  # noqa: PTH110 - as above
        os.remove(path)  # noqa: PTH107 - as above


def _random(dtype: str, rng: np.random.Generator) -> Any:
    if dtype in ("fp32", "fp16", "bf16"):
        values = (rng.standard_normal(BLOCK) * 0.02).astype(np.float32)
        if dtype == "bf16":
            return (values.view(np.uint32) >> 16).astype(np.uint16)
        return values if dtype == "fp32" else values.astype(np.float16)
    return rng.integers(0, 256, BLOCK, dtype=np.uint8)
