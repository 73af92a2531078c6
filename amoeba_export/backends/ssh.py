"""Any runtime on another machine, through SSH: graphs without weights go there, timings come back.

What is sent: the runner (one zip file), a job, and per model its graph, or the files of an artifact. Nothing stays
there (`connection.py`). A connection that drops is made again, and measuring goes on with what is missing.
"""

from __future__ import annotations

import asyncio
import json
import os
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

from pydantic import Field

from amoeba_export.backends import ROUNDS, TIME_LIMIT_S, Availability, Subject, availability_of, find_backend
from amoeba_export.backends.connection import Dropped, Host, connected
from amoeba_export.backends.events import read_event, read_folder
from amoeba_export.backends.runtime import DESCRIBE_LIMIT_S, Job, RuntimeBackend, read_events
from amoeba_export.backends.targets import parse_options
from amoeba_export.errors import InputError, TargetError, TargetUnavailable
from amoeba_export.ir import SILENT, Latency, Progress, Source, Target, Workload
from amoeba_export.model import opening
from amoeba_export.model.foreign_code import modeling_file

ATTEMPTS = 3
"""Connections that are made before a run is given up; one that brought results counts as the first again."""

PATIENCE_S = 120.0
"""Beyond the time limit of a model, for making its weights on a slow disk."""

_PACKAGE = "amoeba_runner"


class Options(Host):
    """The `[options]` table; `over_ssh` makes it from a target and a host.

    Attributes:
        backend: The backend that measures there.
        options: That backend's own options.
    """

    backend: str
    options: dict[str, Any] = Field(default_factory=dict)


source: Source = "measured"
containers: tuple[str, ...] = ("onnx", "safetensors", "gguf")
options_model = Options


def check(target: Target) -> Availability:
    """Connects, starts the runner there and asks its runtime."""
    return availability_of(lambda: _device(target))


def describe(target: Target) -> Mapping[str, str]:
    """What the device over there says of itself."""
    return _device(target)


def measure(
    subjects: Sequence[Subject],
    workload: Workload,
    *,
    target: Target,
    progress: Progress = SILENT,
    rounds: int = ROUNDS,
    time_limit_s: float = TIME_LIMIT_S,
) -> list[Latency | TargetError]:
    """See `Backend`. Raises `TargetUnavailable` when the host cannot be reached or trusted."""
    host, inner, there = _flow(target)
    with (
        inner.job(subjects, workload, target=there, rounds=rounds, time_limit_s=time_limit_s) as job,
        progress.track(f"Measuring on {host.host}", rounds * len(subjects)) as advance,
    ):
        events = asyncio.run(_run(host, job, progress, advance))
        return read_events(events, job, progress=progress)


def _flow(target: Target) -> tuple[Host, RuntimeBackend, Target]:
    """Where it is measured, the backend that measures there, and the target as that one sees it."""
    options = parse_options(target)
    inner = find_backend(options.backend)
    if not isinstance(inner, RuntimeBackend):
        raise InputError(
            f"The backend '{options.backend}' does not run through the runner, so it cannot run over SSH.",
            next_step="Use onnxruntime, genai, openvino, torch or llamacpp.",
        )
    there = replace(target, backend=options.backend, options=options.options)
    parse_options(there)
    return options, inner, there


def _device(target: Target) -> dict[str, str]:
    return dict(_asked(json.dumps(dict(target.options), sort_keys=True), target.name))


@cache
def _asked(options: str, name: str) -> Mapping[str, str]:
    """One connection per process and host: a job without models says what the device is."""
    target = Target(name=name, description="", backend="ssh", options=json.loads(options))
    host, inner, there = _flow(target)
    with inner.job([], Workload(), target=there, rounds=0, time_limit_s=DESCRIBE_LIMIT_S) as job:
        events = asyncio.run(_run(host, job, SILENT, lambda steps: None))
    for event in events:
        if event["event"] == "device":
            device: Mapping[str, str] = event["device"]
            return device
    reason = events[0]
    raise TargetUnavailable(f"{host.host}: {reason['reason']}", reason["next_step"])


async def _run(host: Host, job: Job, progress: Progress, advance: Any) -> list[dict[str, Any]]:
    """All events of `job`, over as many connections as it takes."""
    events: list[dict[str, Any]] = []
    failures = 0
    while True:
        known = len(events)
        try:
            await _attempt(host, job, events, advance)
            return events
        except Dropped as error:
            failures = 1 if len(events) > known else failures + 1
            if failures == ATTEMPTS:
                raise TargetUnavailable(
                    f"the connection to {host.host} broke {ATTEMPTS} times ({error})",
                    "Check the network and the device, and run the command again.",
                ) from error
            progress.warn(f"The connection broke ({error}); connecting again.")
            await asyncio.sleep(failures)


async def _attempt(host: Host, job: Job, events: list[dict[str, Any]], advance: Any) -> None:
    """One connection: send, start, and collect events until `done`. Raises `Dropped`."""
    import asyncssh

    finished = {(event["id"], event["round"]) for event in events if event["event"] == "result"}
    failed = {event["id"] for event in events if event["event"] == "failure"}
    try:
        async with connected(host) as (connection, process):
            first = await asyncio.wait_for(process.stdout.readline(), DESCRIBE_LIMIT_S)
            if not first:
                complaint = (await process.stderr.read()).strip().splitlines()
                raise TargetUnavailable(
                    f"{host.python} does not start on {host.host}: {complaint[-1] if complaint else 'no answer'}",
                    "Set 'python' in the target's options to an interpreter with numpy and the runtime.",
                )
            try:
                folder = read_folder(first)
            except ValueError:
                raise _garbage(host, first) from None
            async with connection.start_sftp_client() as sftp:
                content = await _send(sftp, job, folder, failed)
                content["done"] = sorted(finished)
                await _write(sftp, f"{folder}/job.json", json.dumps(content).encode())
            process.stdin.write("run\n")
            ids = {subject["id"] for subject in job.content["subjects"]}
            patience_s = job.content["time_limit_s"] + PATIENCE_S
            while line := await asyncio.wait_for(process.stdout.readline(), patience_s):
                try:
                    event = read_event(line, subjects=ids, rounds=job.content["rounds"])
                except ValueError:
                    raise _garbage(host, line) from None
                if event["event"] == "device":
                    event["device"]["host"] = host.host.rpartition("@")[2]
                if event["event"] != "device" or not any(one["event"] == "device" for one in events):
                    events.append(event)
                if event["event"] in ("result", "failure"):
                    advance(1)
                if event["event"] in ("done", "unavailable"):
                    return
            raise Dropped("the runner ended early")
    except (ConnectionError, asyncssh.Error, BrokenPipeError, EOFError, TimeoutError) as error:
        raise Dropped(str(error) or type(error).__name__) from error


def _garbage(host: Host, line: str) -> TargetUnavailable:
    return TargetUnavailable(
        f"{host.host} answers what no runner of ours says: {line.strip()[:80]!r}",
        f"Nothing over there may print to stdout: look at what '{host.python}' and the shell print when they start.",
    )


async def _send(sftp: Any, job: Job, folder: str, failed: set[int]) -> dict[str, Any]:
    """Send the runner and what the job's models need, and return the job with the paths over there."""
    archive = job.folder / "runner.zip"
    if not archive.exists():
        pack_runner(archive)
    await sftp.put(str(archive), f"{folder}/runner.zip")
    subjects = []
    for subject in job.content["subjects"]:
        if subject["id"] in failed:
            continue
        there = f"{folder}/{subject['id']}"
        await sftp.put(subject["folder"], there, recurse=True)
        subjects.append({**subject, "folder": there})
    return {**job.content, "subjects": subjects}


async def _write(sftp: Any, path: str, content: bytes) -> None:
    async with sftp.open(path, "wb") as file:
        await file.write(content)


def pack_runner(path: Path) -> None:
    """Zip the runner as a package that `python -m amoeba_runner` finds with the zip file on PYTHONPATH.

    How it opens models, and the class that transformers lacks, go with it.
    """
    files = [*Path(__file__).with_name("runner").glob("*.py"), Path(opening.__file__), modeling_file()]
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for file in sorted(files):
            archive.write(file, os.path.join(_PACKAGE, file.name))  # noqa: PTH118 - a name inside the zip file
