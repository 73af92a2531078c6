"""Measure a job's subjects in rounds, each in a child process with a time limit, in turns of a fraction of a second.

Several open sessions in one process spin against each other, and small graphs measured alone live in the cache: so each
model has a process of its own. A machine drifts within seconds: so as many models as memory can hold are open at once,
and take turns; who waits does nothing. Every round opens them anew, because a process keeps what it got (pages of
memory, say) until it ends, and in another order: of 16 and 24 models the first decoded 5 to 9 % slower than the last.
Odd turns run backwards, so that a drift does not favour the first. A child that hangs, crashes or runs out of memory
costs its own result and no other.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from .device import available_memory_mb, physical_cores, speed_settings, temperature_c
from .weights import copy_files, remove_weights, write_weights

NUM_TURNS = {"decode": 4, "prefill": 3}
"""Turns of each model in a round. Processes differ by more than turns of one do, so more rounds tell more."""

GOLDEN_RATIO = (5**0.5 - 1) / 2
"""Its multiples, less their whole parts, are spread evenly over 0 to 1, wherever one stops."""

MEMORY_SHARE = 0.7
"""The share of the memory that is free which models that are open at once may take."""

MEMORY_FACTOR = 2
"""How much of it a model may take, relative to its prediction: some runtimes keep a second, packed copy of weights."""


def run_job(job: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield the events of `job`.

    `{"event": "device", "device": {...}}` first, or `{"event": "unavailable", "reason", "next_step"}` and nothing more.
    Then, for each subject and round, `{"event": "result", "id", "round", "decode_ms": [...], "prefill_ms": [...],
    "memory_mb"}` or `{"event": "failure", "id", "round", "reason"}`; a subject that failed is not tried again. Last,
    `{"event": "done", "temperature_c": [before, after], "speed": [before, after]}`. Pairs in `job["done"]`
    ([id, round]) are skipped.
    """
    engine = {"engine": job["engine"], "options": job["options"]}
    before, speed = temperature_c(), speed_settings()
    answer = ask("--describe", engine, job["time_limit_s"])
    if "device" not in answer:
        reason = answer.get("unavailable") or answer["failure"]
        yield {"event": "unavailable", "reason": reason, "next_step": answer.get("next_step", "")}
        return
    yield {"event": "device", "device": answer["device"]}
    done = {(subject_id, round_idx) for subject_id, round_idx in job.get("done", ())}
    failed = set()
    for round_idx in range(job["rounds"]):
        left = [
            one
            for one in _begin_elsewhere(job["subjects"], round_idx)
            if one["id"] not in failed and (one["id"], round_idx) not in done
        ]
        groups = _groups(left) if answer["in_main_memory"] else ([one] for one in left)
        for together in groups:
            for subject_id, result in _measure(together, job, engine).items():
                if "decode_ms" in result:
                    yield {"event": "result", "id": subject_id, "round": round_idx, **result}
                else:
                    failed.add(subject_id)
                    reason = result.get("unavailable") or result["failure"]
                    yield {"event": "failure", "id": subject_id, "round": round_idx, "reason": reason}
    yield {"event": "done", "temperature_c": [before, temperature_c()], "speed": [speed, speed_settings()]}


def _begin_elsewhere(subjects: Sequence[Any], round_idx: int) -> Sequence[Any]:
    """`subjects`, in order, but beginning with another one: the places of each are spread evenly over the rounds."""
    first = int(round_idx * GOLDEN_RATIO % 1 * len(subjects))
    return [*subjects[first:], *subjects[:first]]


def _groups(subjects: Sequence[Mapping[str, Any]]) -> Iterator[Sequence[Mapping[str, Any]]]:
    """`subjects`, in order, in groups whose models can be open at once. Who does not tell its `memory_mb` is alone.

    A model's file may exist twice while it is measured: the disk has to have room for as much.
    """
    free_mb = available_memory_mb() * MEMORY_SHARE / MEMORY_FACTOR
    free_mb = min(free_mb, shutil.disk_usage(tempfile.gettempdir()).free / 2**20 / 2)
    group: list[Mapping[str, Any]] = []
    taken_mb = 0.0
    for subject in subjects:
        memory_mb = subject.get("memory_mb", float("inf"))
        if group and taken_mb + memory_mb > free_mb:
            yield group
            group, taken_mb = [], 0.0
        group.append(subject)
        taken_mb += memory_mb
    if group:
        yield group


def _measure(
    subjects: Sequence[Mapping[str, Any]], job: Mapping[str, Any], engine: Mapping[str, Any]
) -> dict[Any, dict[str, Any]]:
    """A round of `subjects`: by id, the samples of each or why there are none.

    What fails beside other models is tried once more alone: there may not have been enough memory for all of them.
    """
    with contextlib.ExitStack() as stack:
        # Started by this thread, not by one of the pool: Linux ends a child with the thread that started it.
        children = {one["id"]: stack.enter_context(Child("--measure", job["time_limit_s"])) for one in subjects}

        def open_model(subject: Mapping[str, Any]) -> dict[str, Any]:
            try:
                fresh = stack.enter_context(_fresh(subject))
            except OSError as error:
                return {"failure": f"its weights could not be written: {error}"}
            return children[subject["id"]].ask({**engine, "subject": fresh, "workload": job["workload"]})

        with ThreadPoolExecutor(physical_cores()) as pool:
            answers = zip(children, pool.map(open_model, subjects))  # noqa: B905 - Python 3.8 knows no strict
        results = {subject_id: answer for subject_id, answer in answers if answer}
        results.update(_take_turns({key: child for key, child in children.items() if key not in results}))
    if len(subjects) > 1:
        for subject in subjects:
            result = results[subject["id"]]
            if "decode_ms" not in result and not result.get("timed_out"):
                results.update(_measure([subject], job, engine))
    return results


def _take_turns(children: Mapping[Any, Child]) -> dict[Any, dict[str, Any]]:
    """The samples of open models, or why one failed: its turns are left out then."""
    samples: dict[Any, dict[str, Any]] = {subject_id: {"decode_ms": [], "prefill_ms": []} for subject_id in children}
    failures: dict[Any, dict[str, Any]] = {}
    for phase, number in NUM_TURNS.items():
        for turn in range(number):
            for subject_id in list(children)[:: -1 if turn % 2 else 1]:
                if subject_id in failures:
                    continue
                answer = children[subject_id].ask({"phase": phase, "turn": turn})
                if "ms" in answer:
                    samples[subject_id][f"{phase}_ms"] += answer["ms"]
                else:
                    failures[subject_id] = answer
    for subject_id in children.keys() - failures.keys():
        answer = children[subject_id].ask({"phase": "close"})
        if "memory_mb" in answer:
            samples[subject_id].update(answer)
        else:
            failures[subject_id] = answer
    return {**samples, **failures}


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
            head = weights.get("head")
            write_weights(path, weights["regions"], head=head and os.path.join(subject["folder"], head))  # noqa: PTH118
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
    """The answer of a child of its own to one request. See `Child`."""
    with Child(mode, time_limit_s) as child:
        return child.ask(request)


class Child:
    """A process of this runner. Leaving it, as a context manager, ends it and whatever it started.

    Args:
        mode: `--measure` or `--describe`.
        time_limit_s: How long it may work on all of its answers.
    """

    def __init__(self, mode: str, time_limit_s: float) -> None:
        self._time_limit_s = self._left_s = time_limit_s
        self._complaints = tempfile.TemporaryFile()  # noqa: SIM115 - closed when it is left
        self._process = subprocess.Popen(
            [sys.executable, "-m", __package__, mode],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._complaints,
            env=_environment(),
            start_new_session=True,
        )

    def __enter__(self) -> Child:
        return self

    def __exit__(self, *_: object) -> None:
        self._end()
        self._complaints.close()

    def ask(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Its answer, or `{"failure": why}` when there is none, with `timed_out` if it is late. Then it has ended."""
        start = time.monotonic()
        reply = self._exchange(json.dumps(request).encode() + b"\n")
        self._left_s -= time.monotonic() - start
        if reply:
            answer: dict[str, Any] = json.loads(reply)
            return answer
        self._end()
        if reply is None:
            return {"failure": f"it took longer than {self._time_limit_s:g} s", "timed_out": True}
        return {"failure": _crash(self._process.returncode, self._complaints)}

    def _exchange(self, request: bytes) -> bytes | None:
        """The answer, empty if the process ended without one, None if it came too late. stdin stays open."""
        stdin, stdout = self._process.stdin, self._process.stdout
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
        reader.join(max(0.0, self._left_s))
        if reader.is_alive():
            return None
        return lines[0] if lines[0].endswith(b"\n") else b""

    def _end(self) -> None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout=0.2)  # it answered for the last time, or crashed, and is ending by itself
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with contextlib.suppress(BrokenPipeError):
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
