"""Pickles without their danger: numpy data and torch weights are read, and whatever else a file names is refused."""

from __future__ import annotations

import io
import pickle
import pickletools
import struct
import tokenize
import zipfile
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from amoeba_export.errors import DamagedFile, NonFiniteWeights, NotFound, UnsafePickle
from amoeba_export.reading.bounds import MAX_DEPTH, shown

# What numpy's own __reduce__ names; numpy 2 calls the module numpy._core, numpy 1 called it numpy.core.
_FUNCTIONS: dict[str, Any] = {"_reconstruct": np.zeros(0).__reduce__()[0], "scalar": np.float64(0).__reduce__()[0]}


class _PickledDtype:
    """A dtype as a pickle describes it. numpy's own takes any state: flags of objects over numbers end in a crash."""

    def __init__(self, name: str, align: bool = False, copy: bool = False) -> None:
        self.dtype = np.dtype(name)
        if self.dtype.names or self.dtype.subdtype:
            raise ValueError("an array of records")

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        order, rest, flags = state[1], state[2:-1], state[-1]
        if not isinstance(order, str) or rest != (None, None, None, -1, -1) or flags != self.dtype.flags:
            raise ValueError(f"an array of {self.dtype} with settings of its own")
        self.dtype = np.dtype(order + self.dtype.str[1:])


class _PickledArray(np.ndarray[Any, Any]):
    """An array that takes a `_PickledDtype`."""

    def __setstate__(self, state: tuple[Any, ...], /) -> None:
        version, shape, dtype, is_fortran, data = state
        super().__setstate__((version, shape, dtype.dtype, is_fortran, data))


def _scalar(dtype: _PickledDtype, data: bytes) -> Any:
    return _FUNCTIONS["scalar"](dtype.dtype, data)


_ADMITTED: dict[tuple[str, str], Any] = {("numpy", "ndarray"): _PickledArray, ("numpy", "dtype"): _PickledDtype} | {
    (f"numpy.{core}.multiarray", name): function
    for core in ("core", "_core")
    for name, function in {**_FUNCTIONS, "scalar": _scalar}.items()
}

_BROKEN = (
    pickle.UnpicklingError,
    struct.error,
    AttributeError,
    EOFError,
    IndexError,
    KeyError,
    MemoryError,
    OverflowError,
    RuntimeError,
    TypeError,
    ValueError,
    tokenize.TokenError,
)
"""What unpickling garbage raises."""


_ADDING = ("APPEND", "APPENDS", "SETITEM", "SETITEMS", "ADDITEMS", "BUILD")
"""Opcodes that give back the container that they took: nothing is nested more deeply by them alone."""


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
        _check_depth(file)
        array = _NumpyUnpickler(file, path).load()
        if not isinstance(array, np.ndarray) or array.shape != ():
            raise DamagedFile(path, "a pickle, but not of an object that numpy saved")
        return array[()]
    except _BROKEN as error:
        raise DamagedFile(path, f"{type(error).__name__}: {shown(str(error))}") from error


def _check_depth(file: io.BytesIO) -> None:
    """Refuse a pickle whose tuples are nested deeply, before it is run: hashing one as a key overflows the C stack.

    The opcodes are followed with the depth of every value in place of the value. Lists and tables are unhashable, so
    that what is added to one later does not matter.

    Raises:
        ValueError: It is nested too deeply, or is no pickle.
        IndexError: It takes more from its stack than there is.
    """
    start = file.tell()
    stack: list[int] = []  # depths; -1 is a mark
    memo: dict[object, int] = {}
    for opcode, argument, _ in pickletools.genops(file):
        name = opcode.name
        if name in ("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"):
            memo[len(memo) if name == "MEMOIZE" else argument] = stack[-1]
            continue
        if name in ("GET", "BINGET", "LONG_BINGET"):
            stack.append(memo.get(argument, 0))
            continue
        if name == "DUP":
            stack.append(stack[-1])
            continue
        taken: list[int] = []
        before = opcode.stack_before
        if pickletools.markobject in before:
            while (depth := stack.pop()) >= 0:
                taken.append(depth)
            before = before[: before.index(pickletools.markobject)]
        taken += [stack.pop() for _ in before]
        depth = max(taken, default=0) + 1
        if depth > MAX_DEPTH and name not in _ADDING:
            raise ValueError(f"its values are nested more than {MAX_DEPTH} deep")
        stack += [-1 if one is pickletools.markobject else min(depth, MAX_DEPTH) for one in opcode.stack_after]
    file.seek(start)


def _unsafe_names(path: Path) -> list[str]:
    """What a pickle names that torch would not load; nothing where it cannot even be listed."""
    try:
        return torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except Exception:  # as above: it walks over the same garbage
        return []


class LoadedWeights:
    """A `TensorSource` over tensors that are already there (or mapped by torch)."""

    def __init__(self, path: Path, weights: Mapping[str, torch.Tensor]) -> None:
        self._path = path
        self._weights = dict(weights)

    def names(self) -> Collection[str]:
        """Every weight there is."""
        return self._weights.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        """Of one weight."""
        return tuple(self._weights[name].shape)

    def dtype(self, name: str) -> torch.dtype:
        """Of one weight."""
        return self._weights[name].dtype

    def read(self, name: str) -> torch.Tensor:
        """One weight. Raises `NonFiniteWeights`."""
        weight = self._weights[name]
        if not torch.isfinite(weight).all():
            raise NonFiniteWeights(name, f"NaN or infinity in {self._path}")
        return weight


def load_pickled_weights(path: Path) -> LoadedWeights:
    """The tensors of a `.bin` file that `torch.save` wrote of a dict, through torch's weights-only loading.

    Raises:
        UnsafePickle: It names anything but tensors. Nothing of it was run.
        DamagedFile: It is not such a file.
    """
    if not zipfile.is_zipfile(path):
        raise DamagedFile(path, "not the zip archive that torch.save writes")
    try:
        data = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # torch's own unpickler promises nothing: even asserts and zlib errors come out of it
        if isinstance(error, pickle.UnpicklingError) and (unsafe := _unsafe_names(path)):
            raise UnsafePickle(path, ", ".join(sorted(unsafe))) from error
        raise DamagedFile(path, f"{type(error).__name__}: {str(error).partition(chr(10))[0]}") from error
    if not isinstance(data, dict) or not all(
        isinstance(name, str) and isinstance(weight, torch.Tensor) for name, weight in data.items()
    ):
        raise DamagedFile(path, "not a table of weights")
    return LoadedWeights(path, data)
