"""Backends that run a model in a runtime of this machine, through the runner."""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from amoeba_export.backends import ROUNDS, TIME_LIMIT_S, Availability, Subject
from amoeba_export.backends.graphs import Prepare
from amoeba_export.backends.runner.engines import advice_for
from amoeba_export.backends.runner.supervise import ask, run_job
from amoeba_export.backends.speed import speed_warnings
from amoeba_export.backends.targets import Strict, parse_options
from amoeba_export.errors import InputError, MeasurementFailed, TargetError, TargetUnavailable, UnsupportedError
from amoeba_export.formats.sizes import weight_bytes
from amoeba_export.ir import SILENT, Latency, Progress, Source, Target, Timing, Workload
from amoeba_export.profile.memory import predict_memory_mb
from amoeba_export.profile.rounds import median_polish, scatter_of

DESCRIBE_LIMIT_S = 60.0


@dataclass(frozen=True, kw_only=True)
class RuntimeBackend:
    """A runtime that the runner can open: one `Backend` for all of them.

    Attributes:
        engine: Name of the runner's engine, or the dotted name of an engine module of yours.
        containers: The formats it runs.
        options_model: Schema of the target's options; its fields are what the engine is given.
        prepare: Makes what the engine opens.
    """

    engine: str
    containers: tuple[str, ...]
    options_model: type[Strict]
    prepare: Prepare
    source: Source = "measured"

    def check(self, target: Target) -> Availability:
        """Starts the runtime in a process of its own and asks it."""
        answer = _describe(self.engine, json.dumps(self.engine_options(target)))
        if "device" in answer:
            return Availability(ok=True)
        return Availability(
            ok=False,
            reason=answer.get("unavailable") or f"the runtime does not start: {answer['failure']}",
            next_step=answer.get("next_step") or "Reinstall the runtime.",
        )

    def describe(self, target: Target) -> Mapping[str, str]:
        """See `Backend`."""
        answer = _describe(self.engine, json.dumps(self.engine_options(target)))
        if "device" not in answer:
            availability = self.check(target)
            raise TargetUnavailable(availability.reason, availability.next_step)
        device: dict[str, str] = answer["device"]
        return device

    def measure(
        self,
        subjects: Sequence[Subject],
        workload: Workload,
        *,
        target: Target,
        progress: Progress = SILENT,
        rounds: int = ROUNDS,
        time_limit_s: float = TIME_LIMIT_S,
    ) -> list[Latency | TargetError]:
        """See `Backend`."""
        with (
            self.job(subjects, workload, target=target, rounds=rounds, time_limit_s=time_limit_s) as job,
            progress.track(f"Measuring on {target.name}", rounds * len(subjects)) as advance,
        ):
            return read_events(run_job(job.content), job, advance=advance, progress=progress)

    def engine_options(self, target: Target) -> dict[str, Any]:
        """The target's options with all defaults, as the engine reads them."""
        options: dict[str, Any] = parse_options(target).model_dump(mode="json")
        return options

    @contextmanager
    def job(
        self, subjects: Sequence[Subject], workload: Workload, *, target: Target, rounds: int, time_limit_s: float
    ) -> Iterator[Job]:
        """A job for the runner, its graphs in a temporary folder. Subjects that cannot be prepared are left out."""
        options = parse_options(target)
        content: dict[str, Any] = {
            "engine": self.engine,
            "options": self.engine_options(target),
            "workload": asdict(workload),
            "rounds": rounds,
            "time_limit_s": time_limit_s,
            "subjects": [],
        }
        errors: dict[int, TargetError] = {}
        with tempfile.TemporaryDirectory(prefix="amoeba-measure-") as scratch:
            for subject_id, subject in enumerate(subjects):
                folder = Path(scratch) / str(subject_id)
                folder.mkdir()
                try:
                    prepared = self.prepare(subject, folder, options)
                    memory_mb = predict_memory_mb(
                        subject.dense,
                        weight_bytes=weight_bytes(subject.dense, self.containers, subject.dtype).total,
                        dtype=subject.dtype,
                        workload=workload,
                        formats=self.containers,
                    )
                    content["subjects"].append({"id": subject_id, "memory_mb": memory_mb, **prepared})
                except (InputError, UnsupportedError) as error:
                    errors[subject_id] = TargetError(error.what, where=error.where, next_step=error.next_step)
            yield Job(
                subjects=subjects,
                workload=workload,
                target=target,
                content=content,
                errors=errors,
                folder=Path(scratch),
            )


@dataclass(frozen=True, kw_only=True)
class Job:
    """What is measured, and how the runner is asked.

    Attributes:
        subjects: What is measured.
        workload: On which prompt, and how many tokens.
        target: Where; messages name it.
        content: What the runner is asked.
        errors: Of subjects that it is not asked about.
        folder: Where its graphs are.
    """

    subjects: Sequence[Subject]
    workload: Workload
    target: Target
    content: dict[str, Any]
    errors: Mapping[int, TargetError]
    folder: Path


@cache
def _describe(engine: str, options: str) -> dict[str, Any]:
    """Asked once per process: what is installed does not change meanwhile."""
    return ask("--describe", {"engine": engine, "options": json.loads(options)}, DESCRIBE_LIMIT_S)


def read_events(
    events: Iterable[Mapping[str, Any]],
    job: Job,
    *,
    progress: Progress,
    advance: Callable[[int], None] = lambda steps: None,
) -> list[Latency | TargetError]:
    """The runner's events as one result per subject.

    A subject's p50 is the median over its rounds, after what a round has in common was taken out (median polish); its
    p90 is p50 times the median tail of its rounds, so that one disturbed round moves neither.

    Raises:
        TargetUnavailable: The runner could not measure at all.
    """
    subjects, target, rounds = job.subjects, job.target, job.content["rounds"]
    samples: dict[tuple[int, int], Mapping[str, Any]] = {}
    errors = dict(job.errors)
    device: dict[str, str] = {}
    for event in events:
        kind = event["event"]
        if kind == "unavailable":
            raise TargetUnavailable(f"Target '{target.name}' cannot be used: {event['reason']}", event["next_step"])
        if kind == "device":
            device = dict(event["device"])
        elif kind == "done":
            device |= _after(event)
            for warning in speed_warnings(*event["speed"], power_mode=target.power_mode):
                progress.warn(warning)
        else:
            subject_id = event["id"]
            if reason := event.get("reason") or _impossible(event):
                errors[subject_id] = _failure(subjects[subject_id], target, reason)
                progress.warn(errors[subject_id].what)
            else:
                samples[subject_id, event["round"]] = event
            advance(1)
    results: list[Latency | TargetError] = []
    timings = {phase: _timings(samples, phase, len(subjects), rounds) for phase in ("decode_ms", "prefill_ms")}
    for subject_id, subject in enumerate(subjects):
        decode, prefill = timings["decode_ms"][subject_id], timings["prefill_ms"][subject_id]
        if subject_id in errors:
            results.append(errors[subject_id])
        elif decode is None or prefill is None:
            results.append(_failure(subject, target, "the runner said nothing about it"))
        else:
            in_order = [samples[key] for key in sorted(samples) if key[0] == subject_id]
            results.append(_latency(decode, prefill, in_order, job.workload, device))
    return results


def _latency(
    decode: Timing, prefill: Timing, events: Sequence[Mapping[str, Any]], workload: Workload, device: Mapping[str, str]
) -> Latency:
    """What a subject's rounds come to; `events` are those of its rounds, in order."""
    memory = [event["memory_mb"] for event in events if event["memory_mb"] is not None]
    return Latency(
        decode=decode,
        prefill=prefill,
        source="measured",
        workload=workload,
        device=device,
        memory_mb=max(memory, default=None),
        rounds=tuple((float(np.median(event["decode_ms"])), float(np.median(event["prefill_ms"]))) for event in events),
    )


def _after(done: Mapping[str, Any]) -> dict[str, str]:
    """What the runner's last event says of the device: its temperatures, and what is not as it was before."""
    temperatures = zip(("before", "after"), done["temperature_c"], strict=True)
    facts = {f"temperature_c_{when}": f"{reading:.1f}" for when, reading in temperatures if reading is not None}
    before, after = done["speed"]
    return facts | {f"{name}_after": value for name, value in after.items() if before.get(name) != value}


def _failure(subject: Subject, target: Target, reason: str) -> MeasurementFailed:
    advice = advice_for(reason) or "Try a smaller model, another dtype, or a higher time limit."
    return MeasurementFailed(subject.label, target.name, reason, advice)


def _impossible(event: Mapping[str, Any]) -> str | None:
    """What is wrong with the samples of `event`, if anything."""
    for phase in ("decode", "prefill"):
        samples = event[f"{phase}_ms"]
        wrong = [value for value in samples if not (math.isfinite(value) and value > 0)]
        if wrong or not samples:
            return f"{phase} took {wrong[0]} ms, which cannot be" if wrong else f"{phase} gave no samples"
    return None


def _timings(
    samples: Mapping[tuple[int, int], Mapping[str, Any]], phase: str, num_subjects: int, rounds: int
) -> list[Timing | None]:
    medians = np.full((num_subjects, rounds), np.nan)
    for (subject_id, round_idx), event in samples.items():
        medians[subject_id, round_idx] = np.median(event[phase])
    # Of two subjects, the ratio that remains is the median of the rounds' ratios: what a budget in percent rests on.
    polished = median_polish(medians)[0]
    timings: list[Timing | None] = []
    for subject_id in range(num_subjects):
        own = [np.asarray(event[phase]) for (i, _), event in sorted(samples.items()) if i == subject_id]
        if not own:
            timings.append(None)
            continue
        centres = [float(np.median(one)) for one in own]
        p50_ms = float(polished[subject_id])
        tail = max(1.0, float(np.median([np.percentile(one, 90) / np.median(one) for one in own])))
        noise, num_samples = scatter_of(centres), sum(map(len, own))
        timings.append(Timing(p50_ms=p50_ms, p90_ms=p50_ms * tail, num_samples=num_samples, noise=noise))
    return timings
