"""Read this first: `build` is a whole build as one list of steps. Nothing here needs torch until something is built."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from amoeba_export.application.costs import is_measured
from amoeba_export.application.resolve import searched_dtype
from amoeba_export.artifact import read_manifest, tool_versions
from amoeba_export.backends.targets import read_target
from amoeba_export.builds.engines import find_engine
from amoeba_export.builds.entry import (
    BuildWork,
    CalibrationTask,
    CostTableTask,
    Entry,
    EntryResult,
    EntryTask,
    LockedEntry,
)
from amoeba_export.builds.inputs import changed_inputs, entry_inputs, fingerprint, is_up_to_date
from amoeba_export.builds.lock import read_lock, read_lock_or_none, write_lock
from amoeba_export.builds.outcome import BuildReport, EntryOutcome, ErrorRecord, read_report
from amoeba_export.builds.read import BuildConfig, read_config
from amoeba_export.builds.report import are_written, write_reports
from amoeba_export.builds.standing import outcome_of, relative
from amoeba_export.cache import Cache
from amoeba_export.errors import AmoebaError, LockedInputChanged, LockedOutputDiffers, NotLocked, UnknownName
from amoeba_export.ir import SILENT, InputId, Progress
from amoeba_export.ir.dtype import AUTO

LOGS = "logs"


@dataclass(frozen=True, kw_only=True)
class BuildOptions:
    """How to build.

    Attributes:
        locked: Rebuild what amoeba.lock says; refuse changed inputs.
        engine: `local` or `ray`.
        only: Names of the entries to build; empty for all.
        jobs: Artifacts verified at once, while nothing is measured.
    """

    locked: bool = False
    engine: str = "local"
    only: tuple[str, ...] = ()
    jobs: int = 2


def build(path: Path, options: BuildOptions, *, progress: Progress = SILENT) -> BuildReport:
    """Build what amoeba.toml asks for and is not there yet, and report on all of it.

    An entry that fails stops no other: the report's `exit_code` tells.

    Raises:
        InputError: amoeba.toml or the lock cannot be used. Nothing was done.
        UsageError: An entry or engine that does not exist.
        KeyboardInterrupt: What was finished is kept, in the lock and in the report.
    """
    start, started = time.monotonic(), datetime.now(UTC).isoformat(timespec="seconds")
    config = read_config(path)
    names = [entry.name for entry in config.entries]
    for name in options.only:
        if name not in names:
            raise UnknownName("build", name, names, where=path)
    engine = find_engine(options.engine, jobs=options.jobs) if options.engine != "local" else None
    locked = read_lock(config.lock) if options.locked else read_lock_or_none(config.lock)
    wanted = [entry for entry in config.entries if not options.only or entry.name in options.only]
    outcomes, tasks = _sort(config, wanted, locked, options, Cache())
    chosen = dict(locked)

    def keep(result: EntryResult) -> None:
        outcomes[result.outcome.name] = result.outcome
        if result.locked is not None and not options.locked:
            chosen[result.outcome.name] = result.locked
            write_lock(config.lock, [chosen[name] for name in names if name in chosen])

    try:
        if tasks:
            engine = engine or find_engine("local", jobs=options.jobs)
            work = _work(tasks)
            for result in engine.run(work, done=keep, progress=progress):
                keep(_checked(result, config, locked) if options.locked else result)
    finally:
        report = BuildReport(
            config=path.name,
            started=started,
            seconds=round(time.monotonic() - start, 3),
            engine=options.engine,
            locked=options.locked,
            tool=tool_versions(),
            entries=tuple(outcomes.get(entry.name) or _skipped(entry, config) for entry in config.entries),
        )
        _write(report, config.out)
    return report


def _sort(
    config: BuildConfig,
    wanted: Sequence[Entry],
    locked: dict[str, LockedEntry],
    options: BuildOptions,
    cache: Cache,
) -> tuple[dict[str, EntryOutcome], list[EntryTask]]:
    """What is up to date, what cannot be built, and what has to be."""
    outcomes: dict[str, EntryOutcome] = {}
    tasks: list[EntryTask] = []
    earlier = _earlier(config.out)
    for entry in wanted:
        known, inputs = locked.get(entry.name), tuple[InputId, ...]()
        log = config.out / LOGS / f"{entry.name}.log"
        try:
            inputs = entry_inputs(entry, cache)
            key = fingerprint(inputs)
            if options.locked:
                known = _still_locked(config, entry, known, inputs)
                key = known.fingerprint
            if is_up_to_date(entry, known, key, cache):
                made = outcome_of(entry, read_manifest(entry.out), fingerprint=key, inputs=inputs, base=config.base)
                outcomes[entry.name] = _remembered(made, earlier.get(entry.name))
                continue
        except AmoebaError as error:
            outcomes[entry.name] = dataclasses.replace(
                _skipped(entry, config), status="failed", error=ErrorRecord.of(error), inputs=inputs
            )
            continue
        tasks.append(
            EntryTask(
                entry=entry,
                fingerprint=key,
                inputs=inputs,
                target=None if options.locked else _measured_on(entry),
                base=config.base,
                log=log,
                locked=known if options.locked else None,
                after=_shared(entry, inputs, locked=options.locked),
            )
        )
    return outcomes, tasks


def _still_locked(
    config: BuildConfig, entry: Entry, known: LockedEntry | None, inputs: Sequence[InputId]
) -> LockedEntry:
    if known is None:
        raise NotLocked(config.lock, entry.name)
    changes = changed_inputs(known, inputs)
    if changes:
        raise LockedInputChanged(config.lock, entry.name, changes)
    return known


def _work(tasks: Sequence[EntryTask]) -> BuildWork:
    """The entries, and before them what several of them need, once."""
    calibrations: dict[str, CalibrationTask] = {}
    tables: dict[str, CostTableTask] = {}
    for task in tasks:
        request = task.entry.request
        for key in task.after:
            if key.startswith("calibration"):
                calibrations.setdefault(key, CalibrationTask(key=key, request=request))
            elif task.target is not None:
                after = next((other for other in task.after if other.startswith("calibration")), None)
                tables.setdefault(key, CostTableTask(key=key, target=task.target, request=request, after=after))
    return BuildWork(
        calibrations=tuple(calibrations.values()), cost_tables=tuple(tables.values()), entries=tuple(tasks)
    )


def _shared(entry: Entry, inputs: Sequence[InputId], *, locked: bool) -> tuple[str, ...]:
    """Keys of the calibration and the cost table that the entry needs.

    A given plan or shape may need no calibration; it finds out for itself, and no table either.
    """
    request = entry.request
    if request.shape or request.plan or locked:
        return ()
    digests = {one.role: one.sha256 for one in inputs}
    strategy = digests.get("strategy") or f"{digests['recipe']}-{request.seed}"
    keys = []
    if request.strategy is None:
        keys.append(f"calibration-{digests['model']}-{strategy}")
    dtype = searched_dtype(request)
    if _measured_on(entry) and dtype != AUTO:  # an entry that weighs precisions measures what it comes to need
        work = f"{request.prompt_tokens}-{request.generate_tokens}-{request.batch}-{dtype}"
        keys.append(f"table-{digests['model']}-{strategy}-{digests['target']}-{work}")
    return tuple(keys)


def _measured_on(entry: Entry) -> str | None:
    """The target that the entry measures on, or None."""
    if entry.request.target is None:
        return None
    target = read_target(entry.request.target)
    return target.name if is_measured(target) else None


def _checked(result: EntryResult, config: BuildConfig, locked: dict[str, LockedEntry]) -> EntryResult:
    """A locked build must give the bytes that the lock promises."""
    if result.locked is None:
        return result
    name, promised = result.outcome.name, locked[result.outcome.name].files
    differing = sorted(
        path
        for path in promised.keys() | result.locked.files.keys()
        if promised.get(path) != result.locked.files.get(path)
    )
    if not differing:
        return result
    error = LockedOutputDiffers(config.lock, name, differing)
    return EntryResult(outcome=dataclasses.replace(result.outcome, status="failed", error=ErrorRecord.of(error)))


def _skipped(entry: Entry, config: BuildConfig) -> EntryOutcome:
    request = entry.request
    return EntryOutcome(
        name=entry.name,
        status="skipped",
        model=Path(request.model).name,
        target=Path(request.target).stem if request.target else None,
        out=relative(entry.out, config.base),
        formats=request.formats or (),
        dtype=request.dtype,
    )


def _earlier(folder: Path) -> dict[str, EntryOutcome]:
    """The outcomes of the last build here, for what a manifest does not have."""
    try:
        return {entry.name: entry for entry in read_report(folder).entries}
    except AmoebaError:
        return {}


def _remembered(made: EntryOutcome, before: EntryOutcome | None) -> EntryOutcome:
    """`made` with the plan, the frontier and the log of the build that made it."""
    if before is None or before.fingerprint != made.fingerprint or before.manifest is None:
        return made
    return dataclasses.replace(before, status="up-to-date", seconds=0.0, files=made.files, error=None)


def _write(report: BuildReport, folder: Path) -> None:
    """The report and its pages. A build that did nothing new leaves those of the last one alone."""
    try:
        before: BuildReport | None = read_report(folder)
    except AmoebaError:
        before = None
    if before is not None and _content(before) == _content(report) and are_written(folder):
        return
    folder.mkdir(parents=True, exist_ok=True)
    write_reports(report, folder)


def _content(report: BuildReport) -> Collection[object]:
    """What a report says, apart from when it was made: an artifact that stays is as good as one just built."""
    return [
        (report.config, report.tool),
        *(
            dataclasses.replace(entry, seconds=0.0, status="built" if entry.status == "up-to-date" else entry.status)
            for entry in report.entries
        ),
    ]
