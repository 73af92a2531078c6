"""From a finished export to its manifest."""

from __future__ import annotations

import dataclasses
from typing import Any

from amoeba_export.application.fit import Fitted
from amoeba_export.application.request import Settings
from amoeba_export.application.session import Session
from amoeba_export.artifact import (
    LatencyRecord,
    Manifest,
    ShapeRecord,
    VerificationRecord,
    tool_versions,
)
from amoeba_export.ir import Supernet
from amoeba_export.ir.dtype import float_name
from amoeba_export.search import quality_surface
from amoeba_export.verify import VerifyReport


def make_manifest(session: Session, fitted: Fitted, report: VerifyReport) -> Manifest:
    """What the artifact is. The list of files is added when it is published."""
    supernet, settings = session.supernet, session.settings
    return Manifest(
        model=supernet.name,
        shape=ShapeRecord.of(fitted.plan),
        dtype=settings.dtype or float_name(supernet.dtype),
        latency=_latency(settings, fitted),
        quality=_quality(supernet, fitted),
        verification=verification_record(report),
        inputs=supernet.inputs,
        tool=tool_versions(),
        dims=dims_of(supernet),
    )


def verification_record(report: VerifyReport) -> VerificationRecord:
    """The figures of `report` that a manifest has."""
    return VerificationRecord(
        max_abs_diff=report.max_abs_diff,
        max_rel_diff=report.max_rel_diff,
        greedy_tokens_equal=report.greedy_tokens_equal,
        mean_kl=report.mean_kl,
        perplexity_ratio=report.perplexity_ratio,
    )


def dims_of(supernet: Supernet) -> dict[str, Any]:
    """What a manifest says of the dims of `supernet`."""
    dims = dataclasses.asdict(supernet.architecture)
    del dims["config"]
    return dims


def _latency(settings: Settings, fitted: Fitted) -> LatencyRecord | None:
    latency, target = fitted.latency, settings.target
    if latency is None or target is None:
        return None
    metric, percentile = settings.metric, settings.request.percentile
    measured = {f"p{level}": latency.of(metric, level) for level in (50, 90)} if latency.source == "measured" else None
    return LatencyRecord(
        metric=metric,
        percentile=percentile,
        budget_ms=fitted.limit_ms,
        predicted_ms=fitted.predicted_ms,
        measured_ms=measured,
        source=latency.source,
        target=target.name,
        workload=settings.workload,
        uncertainty=fitted.uncertainty,
        device=latency.device,
    )


def _quality(supernet: Supernet, fitted: Fitted) -> dict[str, float] | None:
    """The calibrated metric of the chosen shape, and of the full model for comparison."""
    if supernet.strategy is None or not supernet.strategy.quality:
        return None
    surface = quality_surface(supernet.strategy)
    shape = fitted.plan.shape
    quality = fitted.candidate.quality if fitted.candidate else surface.at(shape.depth, shape.width)
    full = surface.at(supernet.architecture.num_layers, 1.0)
    figures = {surface.metric: quality, f"{surface.metric}_full": full}
    return {name: figure.value for name, figure in figures.items() if figure is not None} or None
