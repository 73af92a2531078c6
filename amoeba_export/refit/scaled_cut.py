"""A cut as its container is about to round it: scaled weights, layer by layer, and the grids that they go on."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch

from amoeba_export.ir import Family
from amoeba_export.ir.rounded import BlockQuantizer, Grid


@dataclass(frozen=True, slots=True, kw_only=True)
class ScaledCut:
    """What a container makes of a cut before integers are chosen.

    Attributes:
        weights: Opens the stream of the weights in its layers, in fp32, layer by layer. A matrix that stays as it is
            must be in it what it is without scaling.
        grid_of: What a matrix of `weights` has to lie on; None where it stays as it is.
        head_grid: The same of the matrix that logits come from, which is not scaled.
    """

    weights: Callable[[], Iterable[tuple[str, torch.Tensor]]]
    grid_of: Callable[[str, torch.Tensor], Grid | BlockQuantizer | None]
    head_grid: Callable[[torch.Tensor], Grid | None]

    def by_layer(self, family: Family, count: int) -> Iterator[tuple[int, dict[str, torch.Tensor]]]:
        """The weights of each of `count` layers by their full names. A layer that has none left is there, too."""
        position, held = 0, dict[str, torch.Tensor]()
        for name, weight in self.weights():
            found = family.place(name).layer
            assert found is not None, name
            while position < found:
                yield position, held
                position, held = position + 1, {}
            assert position == found, f"{name} came late"
            held[name] = weight
        while position < count:
            yield position, held
            position, held = position + 1, {}

    def has_choice(self, head: Callable[[], torch.Tensor]) -> bool:
        """Whether any matrix is to be rounded. `head` reads the one that logits come from."""
        in_layers = any(weight.dim() == 2 and self.grid_of(name, weight) for name, weight in self.weights())
        return in_layers or self.head_grid(head().float()) is not None
