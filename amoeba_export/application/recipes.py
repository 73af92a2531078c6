"""What the recipe of a calibration that nobody asked for becomes when nothing that it knows fits."""

from __future__ import annotations

from amoeba_export.calibrate import Recipe

MOST_REMOVED = 0.5
"""Share of the layers that a deepened calibration removes at most."""

LEAST_WIDTHS = (0.4, 0.3)
"""Widths that a deepened calibration knows besides."""


def deepened(recipe: Recipe, num_layers: int) -> Recipe:
    """The same with layers removed down to half of them, and widths down to 0.3; itself where it goes as far.

    What the recipe has scored is found again: only what is new is computed.
    """
    depth, quality = recipe.depth, recipe.quality
    goal = depth.model_copy(update={"max_removed": MOST_REMOVED})
    if goal.removed_of(num_layers) > depth.removed_of(num_layers):
        depth = goal
    more = tuple(width for width in LEAST_WIDTHS if width < min(quality.widths))
    quality = quality.model_copy(update={"widths": (*quality.widths, *more)})
    return recipe.model_copy(update={"depth": depth, "quality": quality})
