"""The containers a subnet is written in. One module each; `FORMATS` is the list.

A format is a module that satisfies `Format`. It answers *can it hold this plan* before anything is computed, and then
takes the weights one by one. It writes into the folder that it is given and nowhere else; staging, checksums and the
rename into place belong to `artifact`.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast

from amoeba_export.ir import Architecture, ContainerLimits, DenseArchitecture, Subnet, Writer

if TYPE_CHECKING:
    from amoeba_export.formats.sizes import WeightBytes


class Format(Protocol):
    """What a format module offers. Its key in `FORMATS` is also its folder in an artifact.

    Attributes:
        default_dtype: The `--dtype` it writes when none is asked for; `source` keeps the dtype of each weight.
        dtypes: Every `--dtype` it can write.
    """

    @property
    def default_dtype(self) -> str: ...  # noqa: D102 - documented above

    @property
    def dtypes(self) -> tuple[str, ...]: ...  # noqa: D102 - documented above

    def check(self, dense: DenseArchitecture, *, dtype: str) -> None:
        """Raise `NotRepresentable`, naming the containers or settings that can, when this one cannot hold `dense`."""

    def limits(self, base: Architecture) -> ContainerLimits:
        """What cuts of a model have to keep."""

    def weight_bytes(self, dense: DenseArchitecture, *, dtype: str) -> WeightBytes:
        """What the weights of `dense` occupy in a `--dtype` (not `source`): the files but for headers, within 1 %."""

    def open_writer(self, subnet: Subnet, folder: Path, *, dtype: str, **options: Any) -> Writer:
        """Start writing `subnet` into `folder`, which exists and is empty.

        Every weight of `subnet.specs` must then be given to the writer's `accept`, in any order.

        Raises:
            NotRepresentable: As `check`.
            DiskFull: Before any work, when the files will not fit.
        """


class LazyFormat:
    """A format module that is imported when it is first used: `--help` lists formats without torch or onnx."""

    def __init__(self, module: str) -> None:
        self._module = module

    def _load(self) -> Format:
        return cast(Format, importlib.import_module(self._module))

    @property
    def default_dtype(self) -> str:
        """See `Format`."""
        return self._load().default_dtype

    @property
    def dtypes(self) -> tuple[str, ...]:
        """See `Format`."""
        return self._load().dtypes

    def check(self, dense: DenseArchitecture, *, dtype: str) -> None:
        """See `Format`."""
        self._load().check(dense, dtype=dtype)

    def limits(self, base: Architecture) -> ContainerLimits:
        """See `Format`."""
        return self._load().limits(base)

    def weight_bytes(self, dense: DenseArchitecture, *, dtype: str) -> WeightBytes:
        """See `Format`."""
        return self._load().weight_bytes(dense, dtype=dtype)

    def open_writer(self, subnet: Subnet, folder: Path, *, dtype: str, **options: Any) -> Writer:
        """See `Format`."""
        return self._load().open_writer(subnet, folder, dtype=dtype, **options)


FORMATS: Mapping[str, Format] = {
    "safetensors": LazyFormat("amoeba_export.formats.safetensors"),
    "onnx": LazyFormat("amoeba_export.formats.onnx"),
    "gguf": LazyFormat("amoeba_export.formats.gguf"),
}
