"""Pickled numpy data without the rest of pickle: arrays, scalars, dtypes, and containers of those."""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import Any

import numpy as np

from amoeba_export.errors import DamagedFile, NotFound, UnsafePickle

# What numpy's own __reduce__ names; numpy 2 calls the module numpy._core, numpy 1 called it numpy.core.
_FUNCTIONS = {"_reconstruct": np.zeros(0).__reduce__()[0], "scalar": np.float64(0).__reduce__()[0]}
_ADMITTED: dict[tuple[str, str], Any] = {("numpy", "ndarray"): np.ndarray, ("numpy", "dtype"): np.dtype} | {
    (f"numpy.{core}.multiarray", name): function for core in ("core", "_core") for name, function in _FUNCTIONS.items()
}

_BROKEN = (
    pickle.UnpicklingError,
    AttributeError,
    EOFError,
    IndexError,
    KeyError,
    MemoryError,
    OverflowError,
    TypeError,
    ValueError,
)
"""What unpickling garbage raises."""


class _NumpyUnpickler(pickle.Unpickler):
    def __init__(self, file: io.BytesIO, path: Path) -> None:
        super().__init__(file)
        self._path = path

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ADMITTED:
            raise UnsafePickle(self._path, f"{module}.{name}")
        return _ADMITTED[module, name]


def load_pickled_npy(path: Path) -> Any:
    """The object inside a `.npy` file that `numpy.save` wrote of a single Python object.

    Raises:
        NotFound: There is no such file.
        UnsafePickle: It names anything but numpy data. Nothing of it was run.
        DamagedFile: It is not such a file.
    """
    if not path.is_file():
        raise NotFound("The file", path)
    file = io.BytesIO(path.read_bytes())
    try:
        version = np.lib.format.read_magic(file)
        if version == (1, 0):
            shape, _, dtype = np.lib.format.read_array_header_1_0(file)
        else:
            shape, _, dtype = np.lib.format.read_array_header_2_0(file)
        if shape != () or dtype != np.dtype(object):
            raise DamagedFile(path, f"an array of {dtype} {list(shape)}, not a pickled object")
        array = _NumpyUnpickler(file, path).load()
        if not isinstance(array, np.ndarray) or array.shape != ():
            raise DamagedFile(path, f"a pickled {type(array).__name__}, not an object that numpy saved")
        return array[()]
    except _BROKEN as error:
        raise DamagedFile(path, f"{type(error).__name__}: {error}") from error
