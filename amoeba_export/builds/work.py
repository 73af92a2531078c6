"""The units of a build, done. An engine decides where each of these functions runs; see `engines`."""

from __future__ import annotations

import dataclasses
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from amoeba_export.application.assemble import Cutter
from amoeba_export.application.costs import make_predictor
from amoeba_export.application.pipeline import ExportResult, export, resolve_settings
from amoeba_export.application.selection import with_strategy
from amoeba_export.application.session import open_session
from amoeba_export.application.ways import Replay
from amoeba_export.artifact import LatencyRecord, Manifest
from amoeba_export.builds.entry import CalibrationTask, CostTableTask, Entry, EntryResult, EntryTask, LockedEntry
from amoeba_export.builds.logs import Logged, open_log
from amoeba_export.builds.outcome import (
    EntryOutcome,
    ErrorRecord,
)
from amoeba_export.builds.plan_record import PlanRecord
from amoeba_export.builds.rounds import Export, Rounds
from amoeba_export.builds.standing import outcome_of, relative
from amoeba_export.cache import Cache
from amoeba_export.cache.kinds import Kind
from amoeba_export.cache.sealed import SEAL_NAME
from amoeba_export.cache.store import KEY_NAME
from amoeba_export.errors import AmoebaError, QualityTooLow, explain
from amoeba_export.formats.write import WriteJob
from amoeba_export.ir import SILENT, Progress, Supernet, Workload
from amoeba_export.ir.metric import better, mode_of

WEIGHTS = (".safetensors", ".onnx", ".data", ".gguf")
"""Files with weights: those that a lock promises byte by byte."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Product:
    """What shared work put into the cache, for the cache of another machine.

    Attributes:
        entries: Kind, facts and files of each entry.
    """

    entries: tuple[tuple[Kind, Mapping[str, Any], Mapping[str, bytes]], ...]


def run_calibration(task: CalibrationTask, *, progress: Progress = SILENT) -> Product:
    """Calibrate, or find the calibration in the cache. Raises what `export` would."""
    cache = _Recording()
    with_strategy(open_session(resolve_settings(task.request, SILENT), cache=cache, progress=progress))
    return cache.product()


def run_cost_table(task: CostTableTask, *, progress: Progress = SILENT) -> Product:
    """Measure the cost table, or find it in the cache. The strategy that it needs must be there. Raises as `export`."""
    cache = _Recording()
    session = with_strategy(open_session(resolve_settings(task.request, SILENT), progress=progress))
    make_predictor(dataclasses.replace(session, cache=cache))
    return cache.product()


def install(product: Product) -> None:
    """Put what another machine made into the cache of this one."""
    cache = Cache()
    for kind, facts, files in product.entries:
        if cache.get(kind, facts) is None:
            cache.put(kind, facts, lambda folder, files=files: _write_files(folder, files))  # type: ignore[misc]


def run_entries(
    tasks: Sequence[EntryTask],
    *,
    jobs: int = 1,
    done: Callable[[EntryResult], None] = lambda result: None,
    progress: Progress = SILENT,
) -> list[EntryResult]:
    """Build artifacts. Those of one supernet whose plans are known together are cut in one pass.

    Up to `jobs` artifacts are verified at once while nothing is measured. An entry that fails has a failed outcome and
    stops no other. What is interrupted leaves nothing half-written.
    """
    rounds = Rounds(lanes=jobs, progress=progress)
    results: dict[int, EntryResult] = {}

    def finish(position: int, result: EntryResult) -> None:
        results[position] = result
        done(result)

    def export_of(task: EntryTask) -> Export[EntryResult]:
        return Export(lambda cut: _run_entry(task, cut, rounds.stopped, progress), measures=task.target is not None)

    rounds.run([export_of(task) for task in tasks], done=finish)
    return [results[position] for position in range(len(tasks))]


def failed(task: EntryTask, error: BaseException, *, seconds: float = 0.0) -> EntryResult:
    """The result of an entry that could not be built."""
    request = task.entry.request
    outcome = EntryOutcome(
        name=task.entry.name,
        status="failed",
        fingerprint=task.fingerprint,
        model=Path(request.model).name,
        target=Path(request.target).stem if request.target else None,
        out=relative(task.entry.out, task.base),
        log=relative(task.log, task.base),
        seconds=seconds,
        dtype=request.dtype,
        formats=request.formats or (),
        error=ErrorRecord.of(error),
        inputs=task.inputs,
    )
    return EntryResult(outcome=outcome)


def _run_entry(task: EntryTask, cut: Cutter, stopped: threading.Event, progress: Progress) -> EntryResult:
    """Build one artifact. The boundary of an entry: whatever goes wrong in it becomes its outcome."""
    start = time.monotonic()
    entry = task.entry
    shared_seconds = 0.0

    def timed_cut(supernet: Supernet, one: WriteJob, listener: Progress) -> None:
        nonlocal shared_seconds
        begun = time.monotonic()
        try:
            cut(supernet, one, listener)
        finally:
            shared_seconds += time.monotonic() - begun

    def own_seconds() -> float:
        return round(time.monotonic() - start - shared_seconds, 3)

    with open_log(task.log) as log:
        listener = Logged(entry.name, log, progress, stopped)
        try:
            result = export(
                entry.request,
                cut=timed_cut,
                replay=_replay(task.locked) if task.locked else None,
                accept=lambda manifest: _check_quality(entry, manifest),
                progress=listener,
            )
            made = _built(task, result, own_seconds())
        except Exception as error:  # one entry must not stop the others, whatever it died of
            explained = explain(error) or error
            log.write(f"error: {explained}\n")
            if not isinstance(explained, AmoebaError):
                traceback.print_exception(error, file=log)
            progress.warn(f"{entry.name}: failed: {str(explained).splitlines()[0]}")
            return failed(task, explained, seconds=own_seconds())
        progress.note(f"{entry.name}: built in {made.outcome.seconds:.1f} s")
        return made


def _replay(locked: LockedEntry) -> Replay:
    latency = locked.latency
    record = latency and LatencyRecord(**{**latency, "workload": Workload(**latency["workload"])})
    return Replay(
        plan=locked.plan,
        dtype=locked.dtype,
        latency=record or None,
        quality=locked.quality,
        reference=locked.reference,
    )


def _check_quality(entry: Entry, manifest: Manifest) -> None:
    if entry.quality_floor is None or not manifest.quality:
        return
    metric, value = next((name, value) for name, value in manifest.quality.items() if not name.endswith("_full"))
    if better(entry.quality_floor, value, mode_of(metric)):
        raise QualityTooLow(str(manifest.shape.shape), metric, value, entry.quality_floor)


def _built(task: EntryTask, result: ExportResult, seconds: float) -> EntryResult:
    """The outcome of a published artifact, and what the lock will say of it."""
    manifest = result.manifest
    assert manifest is not None
    outcome = dataclasses.replace(
        outcome_of(task.entry, manifest, fingerprint=task.fingerprint, inputs=task.inputs, base=task.base),
        status="built",
        seconds=seconds,
        log=relative(task.log, task.base),
        plan=PlanRecord.of(result.plan, result.supernet.architecture),
        frontier=result.frontier,
    )
    if outcome.latency and result.fitted and result.fitted.full:
        full_ms = result.fitted.full.of(result.settings.metric, result.settings.percentile)
        outcome = dataclasses.replace(outcome, latency=dataclasses.replace(outcome.latency, full_ms=full_ms))
    locked = LockedEntry(
        name=task.entry.name,
        fingerprint=task.fingerprint,
        target=outcome.target,
        dtype=manifest.dtype,
        plan=result.plan,
        inputs=task.inputs,
        latency=dataclasses.asdict(manifest.latency) if manifest.latency else None,
        quality=manifest.quality,
        reference=manifest.reference,
        files={file.path: file.sha256 for file in manifest.files if file.path.endswith(WEIGHTS)},
    )
    return EntryResult(outcome=outcome, locked=locked)


class _Recording(Cache):
    """A cache that remembers what was taken from it or put into it."""

    def __init__(self) -> None:
        super().__init__()
        self._used: dict[Path, tuple[Kind, Mapping[str, Any]]] = {}

    def get(self, kind: Kind, facts: Mapping[str, Any], *, progress: Progress = SILENT) -> Path | None:
        folder = super().get(kind, facts, progress=progress)
        if folder is not None:
            self._used[folder] = (kind, facts)
        return folder

    def put(self, kind: Kind, facts: Mapping[str, Any], write: Callable[[Path], None], *, again: bool = False) -> Path:
        folder = super().put(kind, facts, write, again=again)
        self._used[folder] = (kind, facts)
        return folder

    def product(self) -> Product:
        """All of it, with the files."""
        return Product(
            entries=tuple(
                (
                    kind,
                    facts,
                    {
                        path.name: path.read_bytes()
                        for path in folder.iterdir()
                        if path.name not in (KEY_NAME, SEAL_NAME)
                    },
                )
                for folder, (kind, facts) in self._used.items()
            )
        )


def _write_files(folder: Path, files: Mapping[str, bytes]) -> None:
    for name, content in files.items():
        (folder / name).write_bytes(content)
