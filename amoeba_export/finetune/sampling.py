"""Which shapes a step trains: the full one, random ones between, the smallest (paper sec. 3.3, sandwich rule)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from amoeba_export.errors import BadValue
from amoeba_export.finetune.settings import Settings
from amoeba_export.ir import Shape, Strategy


@dataclass(frozen=True, slots=True, kw_only=True)
class ShapeSampler:
    """Draws the shapes of a micro-batch. The draw is a function of seed, step and micro-batch: nothing to save.

    Attributes:
        depths: In falling order; the first is the full net's.
        widths: In falling order; the first is the full net's.
        subnets: Shapes per draw.
    """

    depths: tuple[int, ...]
    widths: tuple[float, ...]
    subnets: int
    seed: int

    def sample(self, step: int, micro: int = 0) -> tuple[Shape, ...]:
        """The full shape, `subnets - 2` random ones, the smallest; with one subnet, the full shape alone.

        As upstream (`trainer.py`, `training_step`): a random depth is any but the full one, random widths are any, and
        differ from each other while there are enough of them.
        """
        full, smallest = Shape(self.depths[0], self.widths[0]), Shape(self.depths[-1], self.widths[-1])
        if self.subnets == 1:
            return (full,)
        rng = np.random.default_rng([self.seed, step, micro])
        num_random = self.subnets - 2
        depths = rng.choice(self.depths[1:] or self.depths, num_random)
        widths = rng.choice(self.widths, num_random, replace=num_random > len(self.widths))
        between = (Shape(int(depth), float(width)) for depth, width in zip(depths, widths, strict=True))
        return (full, *between, smallest)

    def shapes(self) -> tuple[Shape, ...]:
        """Every shape that a draw can contain, largest first."""
        if self.subnets == 1:
            return (Shape(self.depths[0], self.widths[0]),)
        return tuple(Shape(depth, width) for depth in self.depths for width in self.widths)


def sandwich(strategy: Strategy, settings: Settings) -> ShapeSampler:
    """A sampler over the depths and widths of `settings`, which `strategy` must know. The full depth is always one.

    Raises:
        BadValue: A depth that the strategy does not know.
    """
    known = {strategy.num_layers - removed for removed in strategy.depth}
    for depth in settings.depths:
        if depth not in known:
            raise BadValue("A depth", str(depth), f"depths of the strategy: {', '.join(map(str, sorted(known)))}")
    chosen = {strategy.num_layers, *settings.depths} if settings.depths else known
    return ShapeSampler(
        depths=tuple(sorted(chosen, reverse=True)),
        widths=settings.gate_widths,
        subnets=settings.subnets,
        seed=settings.seed,
    )


def one_shape(shape: Shape) -> ShapeSampler:
    """A sampler that trains one shape and nothing else: the baseline of one run per shape."""
    return ShapeSampler(depths=(shape.depth,), widths=(shape.width,), subnets=1, seed=0)
