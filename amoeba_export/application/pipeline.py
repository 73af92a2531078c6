"""Read this first: `export` is the whole job as one list of stages. Each one makes what the next one needs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from amoeba_export.application.assemble import Assembler, Cutter, check_containers, container_dtypes, cut_alone
from amoeba_export.application.costs import is_measured
from amoeba_export.application.fit import Build, Fitted
from amoeba_export.application.goal import check_quality
from amoeba_export.application.manifest import make_manifest
from amoeba_export.application.picks import make_frontier
from amoeba_export.application.request import ExportRequest, ResolvedRequest
from amoeba_export.application.resolve import resolve
from amoeba_export.application.rounded import reads_texts, with_rounding
from amoeba_export.application.session import open_session
from amoeba_export.application.ways import Replay, Way, way_of
from amoeba_export.artifact import FullModelRecord, Manifest, Staging, check_destination
from amoeba_export.errors import EstimateRefused
from amoeba_export.ir import SILENT, Progress, SubnetPlan, Supernet
from amoeba_export.ir.frontier import Frontier
from amoeba_export.search import SearchResult
from amoeba_export.verify import verify_artifact


@dataclass(frozen=True, kw_only=True)
class ExportResult:
    """What `export` made. `manifest` is None after a dry run, `search` when the shape or plan was given.

    Attributes:
        reference: The uncut model in each precision, where there was a choice.
        frontier: What was looked at; None when the shape or plan was given.
    """

    settings: ResolvedRequest
    supernet: Supernet
    plan: SubnetPlan
    search: SearchResult | None = None
    reference: tuple[FullModelRecord, ...] = ()
    frontier: Frontier | None = None
    fitted: Fitted | None = None
    manifest: Manifest | None = None


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
        settings = replay.settle(settings)
    way = replay or way_of(settings)
    if request.dry_run:
        return _plan_only(way, settings, progress)
    with Staging(settings.out, force=request.force) as staging:
        session = check_containers(open_session(settings, progress=progress))
        build = Assembler(staging=staging, cut=cut)
        fitted, looked_at = way.fit(session, build)
        fitted = _rounded(fitted, build)
        session = fitted.session
        report = verify_artifact(
            staging.folder, session.supernet, fitted.plan, rounded=session.rounded, progress=progress
        )
        manifest = make_manifest(fitted, report)
        if replay is not None:
            manifest = replace(manifest, latency=replay.latency, quality=replay.quality, reference=replay.reference)
        check_quality(fitted, manifest)
        if accept is not None:
            accept(manifest)
        manifest = staging.publish(manifest)
    return ExportResult(
        settings=session.settings,
        supernet=session.supernet,
        plan=fitted.plan,
        search=fitted.search,
        reference=manifest.reference,
        frontier=looked_at,
        fitted=fitted,
        manifest=manifest,
    )


def search(request: ExportRequest, *, progress: Progress = SILENT) -> ExportResult:
    """The choice that `export` would start from, and what it was compared with. Writes nothing but caches."""
    settings = resolve_settings(request, progress)
    return _plan_only(way_of(settings), settings, progress)


def frontier(request: ExportRequest, *, measure: int = 0, progress: Progress = SILENT) -> Frontier:
    """What can be had on the target: latency against quality of every shape and precision. Writes nothing but caches.

    Args:
        request: Its limits, if any, are lines in the picture. `ExportRequest.pick` takes a numbered choice.
        measure: So many of the subnets on the frontier are measured.
        progress: Told what is done.

    Raises:
        AmoebaError: As `search` does.
    """
    settings = resolve_settings(request, progress, needs_limit=False)
    session = check_containers(open_session(settings, progress=progress))
    return make_frontier(session, measure=measure)


def resolve_settings(request: ExportRequest, progress: Progress, *, needs_limit: bool = True) -> ResolvedRequest:
    """Read every setting, refuse what cannot be kept, and say what will be done."""
    settings = resolve(request, needs_limit=needs_limit)
    if request.require_measured and settings.target and not is_measured(settings.target):
        raise EstimateRefused(settings.target.name, settings.target.backend)
    progress.note(settings.summary)
    if request.calibration_data and not reads_texts(settings):
        progress.warn(
            "--calibration-data is not used: it is for a refit, for integers that are chosen with data, and for a "
            "--vocab-keep that is a number."
        )
    if settings.target and not is_measured(settings.target):
        progress.warn(
            f"Latencies of '{settings.target.name}' are estimates ({settings.target.backend}): no device is asked."
        )
    return settings


def _rounded(fitted: Fitted, build: Build) -> Fitted:
    """`fitted` with integers chosen with data where its precision has some: written again, and as fast as before."""
    session = with_rounding(fitted.session, fitted.plan)
    if session.rounded is None:
        return fitted
    build(session, fitted.plan)
    return replace(fitted, session=session)


def _plan_only(way: Way, settings: ResolvedRequest, progress: Progress) -> ExportResult:
    if settings.request.dry_run:
        check_destination(settings.out, force=settings.request.force)
    chosen = way.choose(check_containers(open_session(settings, progress=progress)))
    container_dtypes(chosen.session, chosen.plan)
    return ExportResult(
        settings=chosen.session.settings,
        supernet=chosen.session.supernet,
        plan=chosen.plan,
        search=chosen.search,
        reference=chosen.reference,
        frontier=chosen.frontier,
    )
