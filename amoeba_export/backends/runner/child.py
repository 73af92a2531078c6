"""The child process that holds one model: it opens, warms up, measures, answers and ends."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from collections.abc import Callable, Mapping
from typing import Any

from .device import describe_machine, peak_memory_mb
from .engines import Unavailable, load_engine
from .sampling import sample_ms

DECODE = {"warm_up": 3, "seconds": 0.8, "least": 8, "most": 64}
PREFILL = {"warm_up": 1, "seconds": 0.8, "least": 3, "most": 16}


def serve(answer: Callable[[dict[str, Any]], dict[str, Any]]) -> int:
    """Answer the request on stdin (one line of JSON) with one line of JSON on what was stdout.

    Whatever a runtime prints goes to stderr. The process ends when stdin does: it does not outlive who asked.
    """
    reply = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    _end_with_parent()
    request = json.loads(sys.stdin.readline())
    threading.Thread(target=_end_with_stdin, daemon=True).start()
    try:
        result = answer(request)
    except Unavailable as error:
        result = {"unavailable": str(error), "next_step": error.next_step}
    except MemoryError:
        result = {"failure": "it ran out of memory"}
    except KeyboardInterrupt:
        return 130
    except Exception as error:  # whatever a runtime raises is this model's result; the others go on
        result = {"failure": f"{type(error).__name__}: {error}"}
    reply.write(json.dumps(result) + "\n")
    reply.flush()
    # Some runtimes hang or crash while they are torn down; the answer is out, nothing is left to save.
    os._exit(0)


def measure_subject(request: Mapping[str, Any]) -> dict[str, Any]:
    """Open one model, time decode and prefill, and return all samples in milliseconds."""
    _be_killed_first()
    engine = load_engine(request["engine"])
    model = engine.open_model(request["subject"], request["workload"], request["options"])
    decode_ms = sample_ms(
        model.decode, before=getattr(model, "rewind", None), **{**DECODE, **request.get("decode", {})}
    )
    prefill_ms = sample_ms(model.prefill, **{**PREFILL, **request.get("prefill", {})})
    memory_mb = peak_memory_mb()
    model.close()
    return {"decode_ms": decode_ms, "prefill_ms": prefill_ms, "memory_mb": memory_mb}


def describe_device(request: Mapping[str, Any]) -> dict[str, Any]:
    """What the machine and the engine say of themselves."""
    engine = load_engine(request["engine"])
    return {"device": {**describe_machine(), **engine.describe(request["options"])}}


def _end_with_parent() -> None:
    """Linux kills this process with its parent, even one that hangs in native code and never sees stdin end."""
    if sys.platform == "linux":
        import ctypes

        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)


def _end_with_stdin() -> None:
    sys.stdin.read()
    os.kill(os.getpid(), signal.SIGKILL)


def _be_killed_first() -> None:
    """When memory runs out, the kernel should take this process and not the one that waits for it."""
    try:
        with open("/proc/self/oom_score_adj", "w", encoding="ascii") as file:  # noqa: PTH123 - startup counts
            file.write("1000")
    except OSError:
        return  # not Linux, or not allowed: the measurement is the same
