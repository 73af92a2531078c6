"""What a model that was built is worth: measured where its weights were fitted, else what its shape is said to be."""

from __future__ import annotations

from amoeba_export.application.fit import Fitted
from amoeba_export.application.problem import whole_quality
from amoeba_export.application.refits import rise_with
from amoeba_export.ir.metric import after_rise
from amoeba_export.search import quality_surface


def quality_figures(fitted: Fitted) -> dict[str, float] | None:
    """The quality metric with rounding included, and that of the full model as `<metric>_full`.

    Where the weights were refitted, a loss is the full model's, plus the rise that was measured on held-out text with
    the fitted weights, plus what rounding adds to the full model. Where a refit was expected and is not in the plan,
    the shape is worth what it is as it was cut.
    """
    session = fitted.session
    whole = next((one for one in fitted.wholes if one.dtype == session.settings.dtype), None)
    rise = whole.rise if whole else 0.0
    strategy, shape = session.supernet.strategy, fitted.plan.shape
    if strategy is None or not strategy.quality:
        known = whole_quality(session, whole) if whole and strategy is None else None
        return known and {known[0]: after_rise(*known, rise), f"{known[0]}_full": known[1]}
    surface = quality_surface(strategy)
    quality = fitted.candidate.quality if fitted.candidate else None
    if quality is None or quality.source in ("refitted", "predicted"):
        quality = surface.at(shape.depth, shape.width)
    full = surface.at(session.architecture.num_layers, 1.0)
    value = quality and quality.value
    held = session.supernet.refit_of(fitted.plan)
    if held is not None and full is not None and surface.metric in ("loss", "perplexity"):
        value = after_rise(surface.metric, full.value, rise_with(held))
    figures = {surface.metric: None if value is None else after_rise(surface.metric, value, rise)}
    figures[f"{surface.metric}_full"] = full and full.value
    return {name: figure for name, figure in figures.items() if figure is not None} or None
