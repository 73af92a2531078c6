"""What a finished artifact says of itself, as an outcome. Torch-free: a build with nothing to do needs no more."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from amoeba_export.artifact import MANIFEST_NAME, PROVENANCE_NAME, LatencyRecord, Manifest
from amoeba_export.builds.entry import Entry
from amoeba_export.builds.outcome import EntryOutcome, LatencyFigures, QualityFigures
from amoeba_export.ir import InputId
from amoeba_export.ir.metric import is_higher_better


def outcome_of(
    entry: Entry, manifest: Manifest, *, fingerprint: str, inputs: Sequence[InputId], base: Path
) -> EntryOutcome:
    """The outcome of an artifact that is up to date, from its manifest. The plan and the search are not in one."""
    request = entry.request
    return EntryOutcome(
        name=entry.name,
        status="up-to-date",
        fingerprint=fingerprint,
        model=manifest.model,
        target=manifest.latency.target if manifest.latency else None,
        out=relative(entry.out, base),
        manifest=relative(entry.out / MANIFEST_NAME, base),
        provenance=relative(entry.out / PROVENANCE_NAME, base),
        formats=tuple(dict.fromkeys(file.path.split("/")[0] for file in manifest.files if "/" in file.path)),
        dtype=manifest.dtype,
        latency=_latency(manifest.latency, request.latency or request.throughput) if manifest.latency else None,
        quality=_quality(manifest, entry.quality_floor),
        reference=manifest.reference,
        inputs=tuple(inputs),
        files=manifest.files,
    )


def relative(path: Path, base: Path) -> str:
    """`path` from `base` where it lies below, else as it is; with `/`."""
    return path.relative_to(base).as_posix() if path.is_relative_to(base) else path.as_posix()


def _latency(record: LatencyRecord, budget: str | None) -> LatencyFigures:
    return LatencyFigures(
        metric=record.metric,
        percentile=record.percentile,
        budget=budget,
        limit_ms=record.budget_ms,
        predicted_ms=record.predicted_ms,
        uncertainty=record.uncertainty,
        measured_ms=record.measured_ms,
        source=record.source,
        device=record.device,
    )


def _quality(manifest: Manifest, floor: float | None) -> QualityFigures | None:
    figures = manifest.quality or {}
    metric = next((name for name in figures if not name.endswith("_full")), None)
    if metric is None:
        return None
    return QualityFigures(
        metric=metric,
        value=figures[metric],
        full=figures.get(f"{metric}_full"),
        floor=floor,
        higher_is_better=is_higher_better(metric),
    )
