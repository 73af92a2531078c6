"""The grid: every depth that the strategy knows times every width, one percent apart."""

from __future__ import annotations

from functools import partial

from amoeba_export.ir import Architecture, DenseArchitecture, Shape, Strategy, SubnetPlan
from amoeba_export.ir.derive import CutRules, derive_plan
from amoeba_export.search.space import Sketch
from amoeba_export.search.surface import quality_surface

WIDTHS_PER_UNIT = 100
"""Widths are hundredths: fine enough to use a budget, and exact in a shape's text."""


def grid_sketches(strategy: Strategy, architecture: Architecture, rules: CutRules) -> list[Sketch]:
    """Every shape whose quality is known or lies between known ones, the largest first.

    Widths: those that were measured, and between them every hundredth; an upstream import has its listed widths only.
    Of widths that come to the same counts after rounding, the measured one stays, or else the largest.
    """
    surface = quality_surface(strategy)
    depths = sorted((strategy.num_layers - removed for removed in strategy.depth), reverse=True)
    sketches = []
    for width, plan in _widths(strategy, architecture, rules):
        layers = dict(zip(plan.kept_layers, plan.dense(architecture).layers, strict=True))
        for depth in depths:
            shape = Shape(depth, width)
            quality = surface.at(depth, width)
            if quality is None:
                continue
            kept = [i for i, active in enumerate(strategy.depth[strategy.num_layers - depth]) if active]
            sketches.append(
                Sketch(
                    shape=shape,
                    policy=plan.policy,
                    dense=DenseArchitecture(base=architecture, layers=tuple(layers[i] for i in kept)),
                    quality=quality,
                    make_plan=partial(derive_plan, strategy, architecture, shape, rules),
                )
            )
    return sorted(sketches, key=lambda sketch: sketch.shape, reverse=True)


def _widths(strategy: Strategy, architecture: Architecture, rules: CutRules) -> list[tuple[float, SubnetPlan]]:
    """Widths that differ in what they keep, each with its plan at full depth.

    A layer keeps the same units at every depth, so one plan tells a width's counts at all depths.
    """
    measured = {shape.width for shape in strategy.quality}
    if strategy.importance is None:
        widths = {*strategy.widths, 1.0}
    else:
        least = min(measured, default=1 / WIDTHS_PER_UNIT)
        between = (step / WIDTHS_PER_UNIT for step in range(1, WIDTHS_PER_UNIT + 1))
        widths = {*measured, *(width for width in between if width >= least)}
    found: dict[tuple[tuple[int, int, int], ...], tuple[float, SubnetPlan]] = {}
    for width in sorted(widths, key=lambda width: (width not in measured, -width)):
        plan = derive_plan(strategy, architecture, Shape(architecture.num_layers, width), rules)
        counts = tuple(layer.counts for layer in plan.layers)
        found.setdefault(counts, (width, plan))
    return list(found.values())
