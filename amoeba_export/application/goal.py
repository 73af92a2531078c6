"""Choices of a frontier, built: a numbered one, or the fastest that is good enough, whose quality is then measured."""

from __future__ import annotations

import dataclasses

from amoeba_export.application.fit import Build, Fitted, fit_plan
from amoeba_export.application.picks import Pick, pick_quality, quality_limit, quality_unknown
from amoeba_export.application.recovery import recovered
from amoeba_export.application.session import Session
from amoeba_export.application.sweep import sweep
from amoeba_export.application.worth import quality_figures
from amoeba_export.artifact import Manifest
from amoeba_export.errors import NothingGoodEnough, QualityTooLow
from amoeba_export.ir.frontier import Frontier
from amoeba_export.ir.metric import good_enough, mode_of

MOST_PICKS = 3
"""Models that are built before the quality that was asked for is given up."""


def fit_pick(picked: Pick, build: Build) -> Fitted:
    """A choice of a frontier with fitted weights, built and measured; what was expected of it is kept beside."""
    fitted = fit_plan(picked.session, picked.plan, build, full_dtype=picked.wholes[0].dtype)
    point = picked.point
    expected = {"predicted_ms": point.latency_ms, "uncertainty": point.latency_error}
    return recovered(dataclasses.replace(fitted, wholes=picked.wholes, **expected), build)  # type: ignore[arg-type]


def fit_quality(session: Session, build: Build) -> tuple[Fitted, Frontier]:
    """The fastest model that is as good as asked, built and measured, and what it was chosen from.

    A cut whose fitted weights turn out worse than the limit makes the next choice stricter by as much.

    Raises:
        NothingGoodEnough: Nothing is, by what is known beforehand.
        QualityTooLow: What was built was worse than that.
    """
    swept = sweep(session)
    limit, mode = quality_limit(swept), mode_of(swept.frontier.quality_metric)
    picked, stricter_by = pick_quality(swept), 0.0
    for attempt in range(1, MOST_PICKS + 1):
        fitted = fit_pick(picked, build)
        value = _value(fitted)
        if value is None or good_enough(value, limit, mode):
            return fitted, picked.frontier
        name = f"{picked.point.name}: {swept.frontier.quality_metric} {value:.4g}"
        session.progress.note(f"{name} with its final weights; the limit is {limit:.4g}.")
        stricter_by += max(abs(value - limit), 1e-3 * abs(limit))
        tried = picked.point
        try:
            picked = pick_quality(swept, stricter_by=stricter_by)
        except NothingGoodEnough:
            break
        if attempt == MOST_PICKS or picked.point.name == tried.name:
            break
    assert value is not None
    raise QualityTooLow(str(fitted.plan.shape), swept.frontier.quality_metric, value, limit)


def check_quality(fitted: Fitted, manifest: Manifest) -> None:
    """Raise `QualityTooLow` where what was built is worse than the settings accept, `InputError` where nobody knows."""
    wanted = fitted.session.settings.quality
    if wanted is None:
        return
    if not manifest.quality:
        raise quality_unknown()
    metric, value = next((name, one) for name, one in manifest.quality.items() if not name.endswith("_full"))
    full = manifest.quality.get(f"{metric}_full")
    if wanted.value is None and full is None:
        raise quality_unknown()
    least = wanted.resolve(full or 0.0, mode_of(metric))
    if not good_enough(value, least, mode_of(metric)):
        raise QualityTooLow(str(manifest.shape.shape), metric, value, least)


def _value(fitted: Fitted) -> float | None:
    figures = quality_figures(fitted) or {}
    return next((value for name, value in figures.items() if not name.endswith("_full")), None)
