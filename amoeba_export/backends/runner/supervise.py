"""Measure a job's subjects in interleaved rounds, each in a child process with a time limit.

Several open sessions in one process spin against each other, and small graphs measured alone live in the cache: so one
model is open at a time, and every round visits all of them. Odd rounds run backwards, so that a drift of the clocks
does not favour the first. A child that hangs, crashes or runs out of memory costs its own result and no other.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping
from typing import Any

from .device import temperature_c
from .weights import copy_files, remove_weights, write_weights


def run_job(job: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield the events of `job`.

    `{"event": "device", "device": {...}}` first, or `{"event": "unavailable", "reason", "next_step"}` and nothing more.
    Then, for each subject and round, `{"event": "result", "id", "round", "decode_ms": [...], "prefill_ms": [...],
    "memory_mb"}` or `{"event": "failure", "id", "round", "reason"}`; a subject that failed is not tried again. Last,
    `{"event": "done", "temperature_c": [before, after]}`. Pairs in `job["done"]` ([id, round]) are skipped.
    """
    engine = {"engine": job["engine"], "options": job["options"]}
    before = temperature_c()
    answer = ask("--describe", engine, job["time_limit_s"])
    if "device" not in answer:
        reason = answer.get("unavailable") or answer["failure"]
        yield {"event": "unavailable", "reason": reason, "next_step": answer.get("next_step", "")}
        return
    yield {"event": "device", "device": answer["device"]}
    done = {(subject_id, round_idx) for subject_id, round_idx in job.get("done", ())}
    failed = set()
    for round_idx in range(job["rounds"]):
        subjects = job["subjects"] if round_idx % 2 == 0 else job["subjects"][::-1]
        for subject in subjects:
            subject_id = subject["id"]
            if subject_id in failed or (subject_id, round_idx) in done:
                continue
            result = _measure(subject, job, engine)
            if "decode_ms" in result:
                yield {"event": "result", "id": subject_id, "round": round_idx, **result}
            else:
                failed.add(subject_id)
                reason = result.get("unavailable") or result["failure"]
                yield {"event": "failure", "id": subject_id, "round": round_idx, "reason": reason}
    yield {"event": "done", "temperature_c": [before, temperature_c()]}


def _measure(subject: Mapping[str, Any], job: Mapping[str, Any], engine: Mapping[str, Any]) -> dict[str, Any]:
    """One subject, once."""
    try:
        with _fresh(subject) as fresh:
            request = {**engine, "subject": fresh, "workload": job["workload"], **job.get("sampling", {})}
            return ask("--measure", request, job["time_limit_s"])
    except OSError as error:
        return {"failure": f"its weights could not be written: {error}"}


@contextlib.contextmanager
def _fresh(subject: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """`subject` with its files made for this measurement, where a runtime maps them.

    How fast a mapped file is can depend on the pages of memory that it happened to get, for as long as it stays there:
    random weights are written anew each time, and an artifact is copied, so that luck scatters from round to round.
    Both exist only meanwhile: a dozen models would fill a small disk.
    """
    weights = subject.get("weights")
    if weights:
        path = os.path.join(subject["folder"], weights["file"])  # noqa: PTH118 - runs where startup counts
        try:
            write_weights(path, weights["regions"])
            yield subject
        finally:
            remove_weights(path)
    elif subject.get("is_mapped"):
        with tempfile.TemporaryDirectory(prefix="amoeba-measure-") as copy:
            copy_files(subject["folder"], copy)
            yield {**subject, "folder": copy}
    else:
        yield subject


def ask(mode: str, request: Mapping[str, Any], time_limit_s: float) -> dict[str, Any]:
    """Start a child in `mode`, give it `request`, and return its answer, or `{"failure": why}` when there is none."""
    with tempfile.TemporaryFile() as complaints:
        process = subprocess.Popen(
            [sys.executable, "-m", __package__, mode],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=complaints,
            env=_environment(),
            start_new_session=True,
        )
        try:
            reply = _exchange(process, json.dumps(request).encode() + b"\n", time_limit_s)
        finally:
            _kill(process)
        if reply is None:
            return {"failure": f"it took longer than {time_limit_s:g} s"}
        if reply:
            answer: dict[str, Any] = json.loads(reply)
            return answer
        return {"failure": _crash(process.returncode, complaints)}


def _exchange(process: subprocess.Popen[bytes], request: bytes, time_limit_s: float) -> bytes | None:
    """The child's answer, empty if it ended without one, None if it came too late. stdin stays open."""
    stdin, stdout = process.stdin, process.stdout
    assert stdin is not None
    assert stdout is not None
    lines: list[bytes] = []
    reader = threading.Thread(target=lambda: lines.append(stdout.readline()), daemon=True)
    try:
        stdin.write(request)
        stdin.flush()
    except BrokenPipeError:
        return b""
    reader.start()
    reader.join(time_limit_s)
    if reader.is_alive():
        return None
    return lines[0]


def _kill(process: subprocess.Popen[bytes]) -> None:
    """End the child and whatever it started."""
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(timeout=0.2)  # it answered, or crashed, and is ending by itself
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            pipe.close()


def _crash(code: int, complaints: Any) -> str:
    complaints.seek(0)
    lines = [line for line in complaints.read().decode(errors="replace").splitlines() if line.strip()]
    last = f" ({lines[-1].strip()[:300]})" if lines else ""
    if code == -signal.SIGKILL:
        return "its process was killed, as happens when memory runs out"
    if code < 0:
        return f"its process crashed with {signal.Signals(-code).name}{last}"
    return f"its process ended with code {code} and no answer{last}"


def _environment() -> dict[str, str]:
    """The child finds this package where we did (a folder, or the zip file that was sent), and nothing in `.`."""
    root = __file__
    for _ in range(__package__.count(".") + 2):
        root = os.path.dirname(root)  # noqa: PTH120 - a path inside a zip file, too
    paths = [root, os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), "PYTHONSAFEPATH": "1"}
