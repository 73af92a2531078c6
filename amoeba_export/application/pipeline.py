"""Read this first: `export` is the whole job as one list of stages. Each one makes what the next one needs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from amoeba_export.application.costs import is_measured, make_predictor
from amoeba_export.application.dtype import with_dtype
from amoeba_export.application.fit import Fitted, choose, fit_budget, fit_plan
from amoeba_export.application.manifest import make_manifest, write_plan
from amoeba_export.application.request import ExportRequest, Settings, resolve
from amoeba_export.application.selection import given_plan, with_strategy
from amoeba_export.artifact import Cache, LatencyRecord, Manifest, Staging, check_destination
from amoeba_export.backends.targets import graph_options
from amoeba_export.errors import EstimateRefused
from amoeba_export.formats.write import Cut, format_dtypes, write_formats
from amoeba_export.ir import SILENT, Progress, SubnetPlan, Supernet
from amoeba_export.load import load_supernet
from amoeba_export.materialize import materialize_subnet
from amoeba_export.search import SearchResult
from amoeba_export.verify import verify_artifact


@dataclass(frozen=True, kw_only=True)
class ExportResult:
    """What `export` made. `manifest` is None after a dry run, `search` when the shape or plan was given."""

    settings: Settings
    supernet: Supernet
    plan: SubnetPlan
    search: SearchResult | None = None
    fitted: Fitted | None = None
    manifest: Manifest | None = None


@dataclass(frozen=True, kw_only=True)
class Replay:
    """What an earlier export chose, and the figures that its manifest had."""

    plan: SubnetPlan
    latency: LatencyRecord | None = None
    quality: Mapping[str, float] | None = None


Cutter = Callable[[Supernet, Cut, Progress], None]
"""Writes the weights of one cut of a supernet; returns when all of its files are complete."""


def cut_alone(supernet: Supernet, cut: Cut, progress: Progress) -> None:
    """The cutter of a single export: reads the supernet for this cut alone."""
    write_formats(cut.subnet, cut.folder, cut.dtypes, options=cut.options, progress=progress)


def export(
    request: ExportRequest,
    *,
    cut: Cutter = cut_alone,
    replay: Replay | None = None,
    accept: Callable[[Manifest], None] | None = None,
    progress: Progress = SILENT,
) -> ExportResult:
    """Cut the subnet that `request` asks for, and leave it complete at its output folder, or leave nothing there.

    Args:
        request: What is wanted.
        cut: Writes the weights. A build of several artifacts lets those that are ready be cut in one pass.
        replay: A choice made earlier: nothing is searched or measured.
        accept: Raises what speaks against the finished artifact, before it is published.
        progress: Told what is done.

    Raises:
        AmoebaError: Whatever amoeba can name; its kind says whose turn it is. Nothing is left at the output.
    """
    settings = resolve_settings(request, progress)
    if replay is not None:
        settings = replace(settings, plan=replay.plan)
    if request.dry_run:
        return _plan_only(settings, progress)
    cache = Cache()
    with Staging(settings.out, force=request.force) as staging:
        supernet = load_supernet(request.model, adapters=request.adapters, strategy=request.strategy, progress=progress)
        supernet = with_strategy(supernet, settings, cache=cache, progress=progress)
        settings = with_dtype(supernet, settings, cache=cache, progress=progress)

        def build(plan: SubnetPlan) -> Path:
            staging.clear()
            dtypes = format_dtypes(
                plan.dense(supernet.architecture), settings.formats, settings.dtype, explicit=settings.explicit_dtype
            )
            subnet = materialize_subnet(supernet, plan)
            options = _spelling(settings, dtypes)
            cut(supernet, Cut(subnet=subnet, folder=staging.folder, dtypes=dtypes, options=options), progress)
            write_plan(plan, staging.folder)
            return staging.folder

        plan = given_plan(supernet, settings)
        if replay is not None:
            build(replay.plan)
            fitted = Fitted(plan=replay.plan)
        elif plan is None:
            fitted = fit_budget(supernet, settings, build, cache=cache, progress=progress)
        else:
            fitted = fit_plan(supernet, settings, plan, build, progress=progress)
        report = verify_artifact(staging.folder, supernet, fitted.plan, progress=progress)
        manifest = make_manifest(supernet, settings, fitted, report)
        if replay is not None:
            manifest = replace(manifest, latency=replay.latency, quality=replay.quality)
        if accept is not None:
            accept(manifest)
        manifest = staging.publish(manifest)
    return ExportResult(settings=settings, supernet=supernet, plan=fitted.plan, fitted=fitted, manifest=manifest)


def _spelling(settings: Settings, dtypes: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """Settings of the formats that the runtime of the target wants."""
    if settings.target is None or "onnx" not in dtypes:
        return {}
    return {"onnx": graph_options(settings.target, dtypes["onnx"])}


def search(request: ExportRequest, *, progress: Progress = SILENT) -> ExportResult:
    """The choice that `export` would start from, and what it was compared with. Writes nothing but caches."""
    return _plan_only(resolve_settings(request, progress), progress)


def resolve_settings(request: ExportRequest, progress: Progress) -> Settings:
    """Read every setting, refuse what cannot be kept, and say what will be done."""
    settings = resolve(request)
    if request.require_measured and settings.target and not is_measured(settings.target):
        raise EstimateRefused(settings.target.name, settings.target.backend)
    progress.note(settings.summary)
    if settings.target and not is_measured(settings.target):
        progress.warn(
            f"Latencies of '{settings.target.name}' are estimates ({settings.target.backend}): no device is asked."
        )
    return settings


def _plan_only(settings: Settings, progress: Progress) -> ExportResult:
    request, cache = settings.request, Cache()
    if request.dry_run:
        check_destination(settings.out, force=request.force)
    supernet = load_supernet(request.model, adapters=request.adapters, strategy=request.strategy, progress=progress)
    supernet = with_strategy(supernet, settings, cache=cache, progress=progress)
    settings = with_dtype(supernet, settings, cache=cache, progress=progress)
    plan = given_plan(supernet, settings)
    result = None
    if plan is None:
        assert settings.target and supernet.strategy
        predictor = make_predictor(
            supernet,
            settings.target,
            settings.workload,
            settings.dtype or settings.target.dtype,
            cache=cache,
            min_depth=supernet.strategy.min_depth,
            progress=progress,
        )
        result = choose(supernet, settings, predictor)
        plan = result.best.make_plan()
    format_dtypes(plan.dense(supernet.architecture), settings.formats, settings.dtype, explicit=settings.explicit_dtype)
    return ExportResult(settings=settings, supernet=supernet, plan=plan, search=result)
