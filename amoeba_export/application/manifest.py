"""From a finished export to its manifest."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from amoeba_export.application.fit import Fitted
from amoeba_export.application.problem import whole_quality
from amoeba_export.application.request import ResolvedRequest
from amoeba_export.application.rounded import rounded_input
from amoeba_export.application.session import Session
from amoeba_export.application.vocabulary import measure_vocabulary, vocabulary_input
from amoeba_export.application.wholes import Whole
from amoeba_export.application.worth import quality_figures
from amoeba_export.artifact import (
    ContinuationRecord,
    FullModelRecord,
    LatencyRecord,
    Manifest,
    RefitRecord,
    ShapeRecord,
    VerificationRecord,
    tool_versions,
)
from amoeba_export.ir import SubnetPlan
from amoeba_export.ir.metric import after_rise
from amoeba_export.verify import VerifyReport


def make_manifest(fitted: Fitted, report: VerifyReport) -> Manifest:
    """What the artifact is. The list of files is added when it is published."""
    session = fitted.session
    supernet, settings = session.supernet, session.settings
    written = {one.format: one.dtype for one in report.formats}
    return Manifest(
        model=supernet.name,
        shape=ShapeRecord.of(fitted.plan),
        dtype=settings.dtype or written[settings.formats[0]],
        latency=_latency(settings, fitted),
        quality=quality_figures(fitted),
        reference=reference_records(session, _of_this_run(fitted)),
        refit=_refit(session, fitted.plan),
        vocabulary=measure_vocabulary(supernet, fitted.plan),
        verification=verification_record(report),
        continuations=_continuations(report),
        inputs=(
            *supernet.inputs,
            *vocabulary_input(supernet),
            *([rounded_input(session.rounded)] if session.rounded else []),
        ),
        tool=tool_versions(),
        dims=supernet.architecture.facts(),
    )


NUM_CONTINUED = 8
"""Tokens that a manifest tells: enough to see that a runtime has all weights, few enough that it rarely meets a tie."""


def _refit(session: Session, plan: SubnetPlan) -> RefitRecord | None:
    held = session.supernet.refit_of(plan)
    if held is None:
        return None
    return RefitRecord(kind=held.kind, sha256=held.identity, losses=held.losses)


def verification_record(report: VerifyReport) -> VerificationRecord:
    """The figures of `report` that a manifest has."""
    return VerificationRecord(
        max_abs_diff=report.max_abs_diff,
        max_rel_diff=report.max_rel_diff,
        greedy_tokens_equal=report.greedy_tokens_equal,
        mean_kl=report.mean_kl,
        perplexity_ratio=report.perplexity_ratio,
    )


def _continuations(report: VerifyReport) -> tuple[ContinuationRecord, ...]:
    return tuple(
        ContinuationRecord(format=one.format, prompt=one.prompt, tokens=one.tokens[:NUM_CONTINUED])
        for one in report.formats
    )


def _latency(settings: ResolvedRequest, fitted: Fitted) -> LatencyRecord | None:
    latency, target = fitted.latency, settings.target
    if latency is None or target is None:
        return None
    metric, percentile = settings.metric, settings.percentile
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
        full_dtype=fitted.wholes[0].dtype if fitted.wholes else None,
        device=latency.device,
    )


def _of_this_run(fitted: Fitted) -> tuple[Whole, ...]:
    """The uncut model in each precision, as fast as in the run that measured the artifact: a device's speed drifts."""
    now = fitted.full
    if now is None or now.source != "measured":
        return fitted.wholes
    return tuple(
        dataclasses.replace(one, latency=one.latency.as_when(fitted.wholes[0].latency, now)) for one in fitted.wholes
    )


def reference_records(session: Session, wholes: Sequence[Whole]) -> tuple[FullModelRecord, ...]:
    """What the uncut model would give in each precision, the one that relative budgets refer to first."""
    settings = session.settings
    if not wholes:
        return ()
    budgets, reference = settings.budgets, wholes[0].latency
    records = []
    for whole in wholes:
        latency, quality = whole.latency, whole_quality(session, whole)
        keeps = all(budget.is_met(latency, reference) for budget in budgets)
        records.append(
            FullModelRecord(
                dtype=whole.dtype,
                latency_ms=latency.of(settings.metric, settings.percentile),
                source=latency.source,
                quality=quality and {quality[0]: after_rise(*quality, whole.rise)},
                keeps_budget=keeps if budgets else None,
                rounding=whole.rounding.how if whole.rounding else None,
            )
        )
    return tuple(records)
