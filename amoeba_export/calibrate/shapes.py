"""How good each shape of a grid is, on samples that the search has not seen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from amoeba_export.calibrate.evaluator import KeptLayers
from amoeba_export.calibrate.exact import check_number
from amoeba_export.calibrate.ledger import Ledger
from amoeba_export.calibrate.recipe import QualityRecipe
from amoeba_export.ir import SILENT, Architecture, Progress, Shape, Strategy, SubnetPlan
from amoeba_export.ir.derive import CutRules, derive_plan
from amoeba_export.model.head import Objective


def grid_depths(max_removed: int, step: int) -> list[int]:
    """Numbers of removed layers: every `step`-th from 0, and the last."""
    return sorted({*range(0, max_removed + 1, step), max_removed})


def width_plans(strategy: Strategy, architecture: Architecture, recipe: QualityRecipe) -> dict[float, SubnetPlan]:
    """What each width below 1 keeps of every layer. A layer keeps the same at every depth, under both policies."""
    return {
        width: derive_plan(
            strategy,
            architecture,
            Shape(architecture.num_layers, width),
            CutRules(policy=recipe.policy, align=recipe.align, unit=recipe.unit),
        )
        for width in recipe.widths
        if width != 1.0
    }


def measure_quality(
    ledger: Ledger,
    objective: Objective,
    depth: Mapping[int, tuple[int, ...]],
    *,
    widths: Sequence[float],
    removed: Sequence[int],
    progress: Progress = SILENT,
) -> dict[Shape, float]:
    """The metric of every (depth, width), all depths of a width at once: they share what they have in common.

    Args:
        ledger: Over the held-out samples.
        objective: The metric.
        depth: Number of removed layers -> 0/1 vector of kept ones.
        widths: Widths of the grid.
        removed: Depths of the grid, as numbers of removed layers.
        progress: Told of each width.

    Raises:
        NotANumber: The metric of a shape is NaN.
    """
    quality: dict[Shape, float] = {}
    with progress.track("Measuring shapes", len(widths) * len(removed)) as advance:
        for width in widths:
            cuts = {m: KeptLayers(tuple(map(bool, depth[m])), width) for m in removed}
            for (m, cut), scores in zip(cuts.items(), ledger.all(list(cuts.values())), strict=True):
                check_number(scores.tolist(), cut, objective)
                quality[Shape(len(cut.active) - m, width)] = objective.value(scores.tolist())
            advance(len(removed))
    return quality
