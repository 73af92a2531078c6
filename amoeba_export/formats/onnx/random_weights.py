"""A model with random weights, for timing: speed does not depend on values, so no checkpoint has to travel."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from amoeba_export.formats.onnx.data import DataFile, Region
from amoeba_export.formats.onnx.datatype import DataType
from amoeba_export.formats.onnx.weights import WeightStore

_POOL = 1 << 20


def fill_random(file: DataFile, store: WeightStore, *, seed: int) -> None:
    """Fill every weight of `store` from one pool of random values, scaled so that activations stay near 1.

    Values repeat along the file, which no kernel notices. Zeros would be faster than real weights: the pages of a
    sparse file share the cache.
    """
    values = np.random.default_rng(seed).uniform(-math.sqrt(3), math.sqrt(3), _POOL).astype(np.float32)
    known = {region.name for region, _ in store.tables}
    for region in store.layout.regions:
        if region.name not in known:
            pool = _pool(region, values, is_norm=region.name in store.norms)
            columns = math.prod(region.shape[1:])
            step = max(1, _POOL // columns)
            for start in range(0, region.shape[0], step):
                count = min(step, region.shape[0] - start)
                file.write(region, start, np.resize(pool, (count, columns)))


def _pool(region: Region, values: npt.NDArray[np.float32], *, is_norm: bool) -> npt.NDArray[np.generic]:
    """What `region` is filled with: norms 1, biases 0, matrices by their fan-in."""
    if region.dtype == DataType.UINT8:
        return values.view(np.uint8)[: len(values)]
    if len(region.shape) == 1:
        fill = 1.0 if is_norm else 0.0
        return np.full(1, fill).astype(region.dtype.numpy())
    if region.name.endswith("_scales"):
        return np.full(1, 0.01).astype(region.dtype.numpy())
    return (values / math.sqrt(region.shape[-1] if len(region.shape) == 3 else region.shape[1])).astype(
        region.dtype.numpy()
    )
