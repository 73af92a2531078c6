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

SCALE = 1e-3
"""Of integers, about: random bytes as fp16 would be infinite, or too small for a processor's fast path."""


def write_weights(path: str, regions: Sequence[Mapping[str, Any]], *, seed: int = 0, head: str | None = None) -> None:
    """Write the weights file `path` with random values.

    Floats are normal with a deviation of 0.02, as in a trained model: zeros would draw less power than real weights
    and, on a device with a power limit, run faster; denormal numbers would run slower. Integers are uniform.

    Args:
        path: The file; it is replaced.
        regions: `offset`, `length` in bytes and `dtype` of every weight. Integers with fp16 scales between them have
            the `period` after which their layout repeats, and where in it the `scales` are, both in bytes.
        seed: Of the values.
        head: A file whose content comes before the weights.
    """
    blocks: dict[tuple[Any, ...], memoryview] = {}
    rng = np.random.default_rng(seed)
    with open(path, "wb") as file:  # noqa: PTH123 - runs on devices, where startup counts
        if head is not None:
            with open(head, "rb") as first:  # noqa: PTH123 - as above
                file.write(first.read())
        file.truncate(max((region["offset"] + region["length"] for region in regions), default=0))
        for number, region in enumerate(regions):
            period, scales = region.get("period", 1), tuple(region.get("scales", ()))
            kind = (region["dtype"], period, scales)
            if kind not in blocks:
                blocks[kind] = memoryview(_random(*kind, rng)).cast("B")
            block, left = blocks[kind], region["length"]
            start = number * STRIDE % len(block) // period * period
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


def _random(dtype: str, period: int, scales: Sequence[int], rng: np.random.Generator) -> Any:
    if dtype in ("fp32", "fp16", "bf16"):
        values = (rng.standard_normal(BLOCK) * 0.02).astype(np.float32)
        if dtype == "bf16":
            return (values.view(np.uint32) >> 16).astype(np.uint16)
        return values if dtype == "fp32" else values.astype(np.float16)
    if dtype == "ones":
        return np.ones(BLOCK, np.float32)
    integers = rng.integers(0, 256, (BLOCK // period, period), dtype=np.uint8)
    for place in scales:
        numbers = (SCALE * rng.uniform(0.5, 1.5, len(integers))).astype("<f2")
        integers[:, place : place + 2] = numbers[:, None].view(np.uint8)
    return integers.reshape(-1)
