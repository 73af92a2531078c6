"""Any runtime on any device, through commands of the user's: one brings a model, one times it, one removes it.

Each model is pushed once, timed in every round in turn with the others, and cleaned up at the end, whatever happens.
What commands print is a stranger's: it is read with bounds, and figures that cannot be are refused.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

from amoeba_export.backends import ROUNDS, TIME_LIMIT_S, Availability, Subject, availability_of
from amoeba_export.backends.command.options import Options
from amoeba_export.backends.command.process import Broke, run_words
from amoeba_export.backends.command.template import PATHS, placeholders, spelled
from amoeba_export.backends.command.timed import FAILURES, TimedModel
from amoeba_export.backends.runtime import DESCRIBE_LIMIT_S, Job, read_events
from amoeba_export.backends.targets import parse_options
from amoeba_export.errors import AmoebaError, TargetError, TargetUnavailable
from amoeba_export.ir import SILENT, Latency, Progress, Source, Target, Workload

CLEANERS = 4
"""Models that are removed from a device at a time."""

T = TypeVar("T")

source: Source = "measured"
containers: tuple[str, ...] = PATHS[1:]
options_model = Options


def check(target: Target) -> Availability:
    """Whether the programs are there, and the commands that describe the device work."""
    return availability_of(lambda: describe(target))


def describe(target: Target) -> Mapping[str, str]:
    """What the commands of `describe` say. Raises `TargetUnavailable`."""
    options: Options = parse_options(target)
    for program in options.programs:
        if shutil.which(program) is None:
            raise TargetUnavailable(
                f"there is no program '{program}' here", "Install it, or correct the commands of the target file."
            )
    said = {name: _said(name, words) for name, words in options.describe.items()}
    return {"command": " ".join(dict.fromkeys(Path(words[0]).name for words in options.runs.values())), **said}


@lru_cache(maxsize=64)
def _said(name: str, words: tuple[str, ...]) -> str:
    """Asked once per process, as other backends do."""
    try:
        ran = run_words(words, limit_s=DESCRIBE_LIMIT_S)
    except Broke as error:
        said = f": {error.printed.split('|')[-1].strip()}" if error.printed else ""
        raise TargetUnavailable(
            f"the command that tells its {name} failed, {error.reason}{said}",
            f"Run it yourself: {spelled(words)}",
        ) from error
    lines = [line.strip() for line in ran.stdout.splitlines() if line.strip()]
    return lines[-1][:200] if lines else "nothing"


def measure(
    subjects: Sequence[Subject],
    workload: Workload,
    *,
    target: Target,
    progress: Progress = SILENT,
    rounds: int = ROUNDS,
    time_limit_s: float = TIME_LIMIT_S,
) -> list[Latency | TargetError]:
    """See `Backend`. Raises `TargetError` when the command cannot do `workload`."""
    options: Options = parse_options(target)
    _check_workload(options, workload, target)
    events: list[dict[str, Any]] = [{"event": "device", "device": dict(describe(target))}]
    errors: dict[int, TargetError] = {}
    with tempfile.TemporaryDirectory(prefix="amoeba-command-") as scratch:
        runs = [
            TimedModel(
                subject, Path(scratch) / str(position), workload, target, options, options.timeout_s or time_limit_s
            )
            for position, subject in enumerate(subjects)
        ]

        def attempt(position: int, work: Callable[[], T]) -> T | None:
            try:
                return work()
            except (*FAILURES, OSError) as error:
                errors[position] = _as_target_error(error, subjects[position])
                progress.warn(errors[position].what.splitlines()[0])
                return None

        try:
            for position, one in enumerate(runs):
                attempt(position, one.push)
            with progress.track(f"Measuring on {target.name}", rounds * len(subjects)) as advance:
                for round_idx in range(rounds):
                    for position in list(range(len(runs)))[:: -1 if round_idx % 2 else 1]:
                        if position not in errors and (found := attempt(position, runs[position].time)) is not None:
                            events.append(
                                {"event": "result", "id": position, "round": round_idx, "memory_mb": None, **found}
                            )
                        advance(1)
        finally:
            # Several at a time: after an interrupt there are seconds for all of them.
            with ThreadPoolExecutor(CLEANERS) as pool:
                for problem in pool.map(TimedModel.clean_up, runs):
                    if problem:
                        progress.warn(problem)
        job = Job(
            subjects=subjects,
            workload=workload,
            target=target,
            content={"rounds": rounds},
            errors=errors,
            folder=Path(scratch),
        )
        return read_events(events, job, progress=progress)


def _as_target_error(error: AmoebaError | OSError, subject: Subject) -> TargetError:
    if isinstance(error, TargetError):
        return error
    if isinstance(error, OSError):
        return TargetError(
            f"The files of {subject.label} cannot be written here: {error.strerror}.",
            where=error.filename,
            next_step="Make room, or set TMPDIR to a folder where files can be written.",
        )
    return TargetError(error.what, where=error.where, next_step=error.next_step)


def _check_workload(options: Options, workload: Workload, target: Target) -> None:
    fixed = options.prompt_tokens
    used = set().union(*map(placeholders, options.runs.values()))
    if fixed is not None and workload.prompt_tokens != fixed:
        raise TargetError(
            f"The command of '{target.name}' always reads {fixed} tokens, not {workload.prompt_tokens}.",
            next_step=f"Use --prompt {fixed}, or give the command a {{prompt}}.",
        )
    if workload.batch != 1 and "batch" not in used:
        raise TargetError(
            f"The command of '{target.name}' runs one sequence, not {workload.batch}.",
            next_step="Use --batch 1, or give the command a {batch}.",
        )
    if options.e2e and workload.generate_tokens < 2:
        raise TargetError(
            f"'{target.name}' tells decode by a run of one token and one of more; one more is needed.",
            next_step="Use --generate 2 or more.",
        )
