"""Which containers have integers that data can choose, and what a rounding that does has to know of each."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Protocol, cast

from amoeba_export.formats import FORMATS

if TYPE_CHECKING:
    import torch

    from amoeba_export.ir import Subnet
    from amoeba_export.ir.rounded import BlockQuantizer, Grid


class ChosenWithData(Protocol):
    """What the module of a container offers."""

    def takes_data(self, dtype: str, *, asked: bool) -> bool:
        """Whether integers of the layers are chosen with data in one of its `dtypes`: always, or only if `asked`."""

    def scaled_layers(self, subnet: Subnet, dtype: str) -> Iterator[tuple[str, torch.Tensor]]:
        """The weights of the layers in fp32, in order, scaled as the writer of `dtype` scales them."""

    def grid_of(self, name: str, weight: torch.Tensor, subnet: Subnet, dtype: str) -> Grid | BlockQuantizer | None:
        """What a matrix of `scaled_layers` must lie on; None where it stays as it is."""

    def head_grid(self, weight: torch.Tensor, dtype: str) -> Grid | None:
        """The same of the matrix that logits come from, which is not scaled. It may be the embedding, too."""


_MODULES: Mapping[str, str] = MappingProxyType(
    {
        "onnx": "amoeba_export.formats.onnx.rounding",
        "gguf": "amoeba_export.formats.gguf.rounding",
        "safetensors": "amoeba_export.formats.packed_rounding",
    }
)


def chosen_with_data(container: str) -> ChosenWithData:
    """See `ChosenWithData`."""
    return cast(ChosenWithData, importlib.import_module(_MODULES[container]))


def container_with_data(formats: Sequence[str], dtype: str, *, asked: bool) -> str | None:
    """The first container among `formats` whose integers data chooses in `dtype`. One export rounds for one."""
    for name in _MODULES:
        if name in formats and dtype in FORMATS[name].dtypes and chosen_with_data(name).takes_data(dtype, asked=asked):
            return name
    return None
