"""The child process that holds one model: it opens it, takes its turns at measuring, answers each time, and ends."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from .device import describe_machine, peak_memory_mb
from .engines import Unavailable, load_engine
from .sampling import sample_ms

TURNS: dict[str, dict[str, Any]] = {
    "decode": {"warm_up": 1, "seconds": 0.2, "least": 2, "most": 16},
    "prefill": {"warm_up": 0, "seconds": 0.2, "least": 1, "most": 4},
}
"""How long one turn is. A prompt is long enough to warm the caches itself."""

FIRST_WARM_UP = {"decode": 3, "prefill": 1}
"""Uncounted calls ahead of a model's first turn."""

REST_S = 0.01
"""A model that used less than half of one core for so long is idle."""

LONGEST_REST_S = 0.5
"""How long to wait for that."""


def serve(answers: Callable[[Iterator[Mapping[str, Any]]], Iterator[Mapping[str, Any]]]) -> int:
    """Answer each request on stdin (a line of JSON) with a line of JSON on what was stdout, until `answers` ends.

    Whatever a runtime prints goes to stderr. The process ends when stdin does: it does not outlive who asked.
    """
    reply = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    _end_with_parent()
    requests: queue.Queue[Mapping[str, Any]] = queue.Queue()
    threading.Thread(target=_read_requests, args=(requests,), daemon=True).start()
    try:
        for answer in _or_failure(answers(iter(requests.get, None))):
            reply.write(json.dumps(answer) + "\n")
            reply.flush()
    except KeyboardInterrupt:
        return 130
    # Some runtimes hang or crash while they are torn down; the answers are out, nothing is left to save.
    os._exit(0)


def measure_model(requests: Iterator[Mapping[str, Any]]) -> Iterator[Mapping[str, Any]]:
    """Open a model and take turns with it.

    The first request says which `subject`, the next ones which `phase` (`decode` or `prefill`) and which `turn` of it;
    the answers have the turn's samples in `ms`. The last phase is `close`; its answer is `memory_mb`.
    """
    request = next(requests)
    _be_killed_first()
    model = load_engine(request["engine"]).open_model(request["subject"], request["workload"], request["options"])
    _rest()
    yield {}
    steps = {"decode": (model.decode, getattr(model, "rewind", None)), "prefill": (model.prefill, None)}
    for request in requests:
        phase = request["phase"]
        if phase == "close":
            break
        step, before = steps[phase]
        settings = {**TURNS[phase], **({} if request["turn"] else {"warm_up": FIRST_WARM_UP[phase]})}
        samples = sample_ms(step, before=before, **settings)
        _rest()
        yield {"ms": samples}
    yield {"memory_mb": getattr(model, "peak_memory_mb", peak_memory_mb)()}
    model.close()


def describe_device(requests: Iterator[Mapping[str, Any]]) -> Iterator[Mapping[str, Any]]:
    """What the machine and the engine say of themselves, and whether models lie in main memory."""
    request = next(requests)
    engine = load_engine(request["engine"])
    in_main_memory = getattr(engine, "in_main_memory", lambda options: False)
    yield {
        "device": {**describe_machine(), **engine.describe(request["options"])},
        "in_main_memory": in_main_memory(request["options"]),
    }


def _or_failure(answers: Iterator[Mapping[str, Any]]) -> Iterator[Mapping[str, Any]]:
    """The answers; instead of one that cannot be given, why not."""
    try:
        yield from answers
    except Unavailable as error:
        yield {"unavailable": str(error), "next_step": error.next_step}
    except MemoryError:
        yield {"failure": "it ran out of memory"}
    except Exception as error:  # whatever a runtime raises is this model's result; the others go on
        yield {"failure": f"{type(error).__name__}: {error}"}


def _rest() -> None:
    """Wait until this process is idle, so that the model whose turn is next has all cores.

    Threads of a runtime go on looking for work for a while when a step is done: on two cores, those of ONNX Runtime
    made the next model's first prompt 24 % slower and its first token, after one of warm-up, 50 %.
    """
    end = time.perf_counter() + LONGEST_REST_S
    used_s = time.process_time()
    while time.perf_counter() < end:
        time.sleep(REST_S)
        before_s, used_s = used_s, time.process_time()
        if used_s - before_s < REST_S / 2 and not _others_run():
            return


def _others_run() -> bool:
    """Whether another thread of this process runs or waits for a core, which a busy machine does not hide."""
    if sys.platform != "linux":
        return False
    own = str(threading.get_native_id())
    states = []
    for task in Path("/proc/self/task").iterdir():
        with contextlib.suppress(OSError):  # it has ended meanwhile
            states += [(task / "stat").read_text().rpartition(")")[2].split()[0]] if task.name != own else []
    return "R" in states


def _end_with_parent() -> None:
    """Linux kills this process with its parent, even one that hangs in native code and never sees stdin end."""
    if sys.platform == "linux":
        import ctypes

        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)


def _read_requests(requests: queue.Queue[Mapping[str, Any]]) -> None:
    for line in sys.stdin:
        requests.put(json.loads(line))
    os.kill(os.getpid(), signal.SIGKILL)


def _be_killed_first() -> None:
    """When memory runs out, the kernel should take this process and not the one that waits for it."""
    try:
        with open("/proc/self/oom_score_adj", "w", encoding="ascii") as file:  # noqa: PTH123 - startup counts
            file.write("1000")
    except OSError:
        return  # not Linux, or not allowed: the measurement is the same
