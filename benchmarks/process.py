"""What a process takes: its time, and the peak of its memory. Every benchmark measures it so."""

from __future__ import annotations

import os
import resource
import subprocess
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

RESIDENT, ANONYMOUS = "VmHWM", "RssAnon"


@dataclass(frozen=True)
class Ran:
    """A process that ended well.

    Attributes:
        wall_s: From its start to its exit.
        peak_mb: Resident memory as the kernel counts it: mapped input is in it.
        anon_mb: The peak of the memory that is no file's, polled; 0 where the system does not tell.
        printed: Its output.
    """

    wall_s: float
    peak_mb: float
    anon_mb: float
    printed: str


def run_process(command: Sequence[str], *, name: str = "") -> Ran:
    """Run `command` to its end; where it fails, so does the benchmark. `name`: what to call it then."""
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stderr is not None
    stderr, errors, ended = process.stderr, [], threading.Event()
    peaks_mb = {ANONYMOUS: 0.0, RESIDENT: 0.0}
    watcher = threading.Thread(target=_watch, args=(process.pid, peaks_mb, ended))
    drain = threading.Thread(target=lambda: errors.append(stderr.read()))
    watcher.start()
    drain.start()
    printed = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    wall_s = time.perf_counter() - start
    ended.set()
    drain.join()
    watcher.join()
    process.returncode = os.waitstatus_to_exitcode(status)
    if status:
        raise SystemExit(f"{name or ' '.join(command)} failed:\n{errors[0][-2000:]}")
    # ru_maxrss starts at what this process has resident when it forks, so it counts only where there is no /proc.
    return Ran(wall_s, peaks_mb[RESIDENT] or usage.ru_maxrss / 1024, peaks_mb[ANONYMOUS], printed)


def own_peak_mb() -> float:
    """The peak of this process's resident memory so far."""
    return _memory_mb("self").get(RESIDENT) or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def _watch(pid: int, peaks_mb: dict[str, float], ended: threading.Event) -> None:
    """The largest value seen of each, every 20 ms."""
    while not ended.wait(0.02):
        found_mb = _memory_mb(str(pid))
        for name in peaks_mb:
            peaks_mb[name] = max(peaks_mb[name], found_mb.get(name, 0.0))


def _memory_mb(process: str) -> dict[str, float]:
    """What /proc says of it; nothing where it ended, or where the system has no /proc."""
    try:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
    except OSError:
        return {}
    told = (line.partition(":") for line in lines)
    return {name: int(rest.split()[0]) / 1024 for name, _, rest in told if name in (RESIDENT, ANONYMOUS)}
