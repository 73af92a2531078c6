"""Every weight is produced exactly once: what a writer still waits for, and the error of one that it does not."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import torch

from amoeba_export.errors import WeightsMismatch


class Awaited:
    """Names and shapes of the weights that a writer was not given yet.

    Args:
        shapes: Of all of them.
        folder: Where errors say it is.
    """

    def __init__(self, shapes: Mapping[str, tuple[int, ...]], folder: Path) -> None:
        self._shapes, self._folder = shapes, folder
        self._missing = dict.fromkeys(shapes)

    def __iter__(self) -> Iterator[str]:
        """Names of all, given or not."""
        return iter(self._shapes)

    def given(self, name: str, weight: torch.Tensor) -> None:
        """Strike a weight off. Raises `WeightsMismatch` for one that is unknown, given twice, or of another shape."""
        expected = self._shapes.get(name)
        if expected is None:
            problem = "is not part of this model"
        elif name not in self._missing:
            problem = "was given twice"
        elif expected != tuple(weight.shape):
            problem = f"is {list(weight.shape)}, not {list(expected)}"
        else:
            del self._missing[name]
            return
        raise WeightsMismatch([f"{name} {problem}"], where=self._folder)

    def check_complete(self) -> None:
        """Raise `WeightsMismatch` when a weight was not given."""
        if self._missing:
            raise WeightsMismatch([f"{name} is missing" for name in self._missing], where=self._folder)
