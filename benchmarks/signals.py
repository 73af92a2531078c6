"""Signals at random moments: does every command end in time, and what does it leave?

Run: python -m benchmarks.signals --count 40

Each command of `tests/stopping.py` runs once undisturbed. Then it runs again and again, each time with SIGINT, SIGTERM
or SIGHUP at a moment drawn from its whole run, every other time with a second signal shortly after. It has to end
within 5 s, with exit code 130, or 0 if it was done already; nothing half-written may lie beside its output or in the
cache, no temporary file, no process. With `--fresh`, every run is a new interpreter, so that moments during imports are
drawn too; without, runs are forks of one that has imported everything.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

LIMIT_S = 5.0
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
PR_SET_CHILD_SUBREAPER = 36


@dataclass(frozen=True)
class Seen:
    """One run: its exit code, how long it took to end after the signal, and what was wrong."""

    code: int
    seconds: float
    wrong: tuple[str, ...]


def start(words: Sequence[str], place: Path, *, fresh: bool) -> int:
    """Begin `amoeba WORDS` in `place`, with a cache and a folder for temporary files of its own. Returns its pid."""
    places = {"AMOEBA_CACHE": str(place / "cache"), "TMPDIR": str(place / "tmp"), "HF_HUB_OFFLINE": "1"}
    if fresh:
        code = "from amoeba_export.cli.entry import entry; entry()"
        with (place / "said").open("w") as said:
            process = subprocess.Popen(
                [sys.executable, "-c", code, *words],
                cwd=place,
                env={**os.environ, **places, "PYTHONPATH": str(Path(__file__).parents[1])},
                stdout=said,
                stderr=said,
            )
        process.returncode = 0  # it is waited for here, not by its object
        return process.pid
    began, begins = os.pipe()
    pid = os.fork()
    if pid:
        os.close(begins)
        os.read(began, 1)  # the moment from which it can be stopped: before, it is a copy of this process
        os.close(began)
        return pid
    try:
        os.chdir(place)
        os.environ.update(places)
        tempfile.tempdir = None
        said_to = os.open("said", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(said_to, 1)
        os.dup2(said_to, 2)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        from amoeba_export.cli.entry import entry

        sys.argv = ["amoeba", *words]
        os.write(begins, b"!")
        entry()
    except SystemExit as stop:
        sys.stdout.flush()
        os._exit(int(stop.code or 0))
    finally:
        os._exit(70)


def wait(pid: int, limit_s: float) -> int | None:
    """Its exit code (negative: the signal that killed it), or None if it is not over in time."""
    end = time.monotonic() + limit_s
    while time.monotonic() < end:
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.005)
    return None


def processes() -> list[int]:
    """Children of this process: a run's orphans become ours."""
    tasks = Path(f"/proc/{os.getpid()}/task").glob("*/children")
    return [int(pid) for children in tasks for pid in children.read_text().split()]


def disturb(words: Sequence[str], place: Path, moment_s: float, numbers: Sequence[int], *, fresh: bool) -> Seen:
    """Run once, send `numbers` from `moment_s` on, and look at what is there."""
    from tests.stopping import Scene

    pid = start(words, place, fresh=fresh)
    code = wait(pid, moment_s)
    sent = time.monotonic()
    was_over = code is not None
    if not was_over:
        for number in numbers:
            os.kill(pid, number)
            code = wait(pid, 0.1) if number != numbers[-1] else wait(pid, LIMIT_S)
            if code is not None:
                break
    seconds = time.monotonic() - sent
    wrong = []
    if code is None:
        wrong.append(f"not over after {LIMIT_S} s")
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        code = -9
    elif code in [-number for number in numbers] and not (place / "said").read_text():
        code = 130  # the interpreter was not up yet
    elif code not in (0, 130):
        wrong.append(f"exit code {code}")
    end = time.monotonic() + LIMIT_S
    while (left := processes()) and time.monotonic() < end:
        for one in left:
            os.waitpid(one, os.WNOHANG)
        time.sleep(0.01)
    wrong += [f"process {one} is left" for one in left]
    for one in left:
        os.kill(one, signal.SIGKILL)
        os.waitpid(one, 0)
    wrong += [f"tmp/{path.name} is left" for path in sorted((place / "tmp").iterdir())]
    wrong += [f"{path} is left" for path in Scene(place).left_behind()]
    wrong += [
        f"{path.relative_to(place)} is left" for path in (place / "cache").glob("*/.*") if path.name != ".occupied"
    ]
    if wrong or "Traceback" in (place / "said").read_text():
        wrong.append(f"it said: ...{(place / 'said').read_text()[-1500:]}")
    return Seen(0 if was_over else code, seconds, tuple(wrong))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=40, help="signals per command")
    parser.add_argument("--only", action="append", help="this command; repeat for several")
    parser.add_argument("--fresh", action="store_true", help="a new interpreter each time")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1)
    from tests.stopping import ARTIFACT, COMMANDS, make_scene

    if not arguments.fresh:  # once, not in every fork
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
        import transformers.models.llama.modeling_llama  # noqa: F401

        import amoeba_export.application.pipeline
        import amoeba_export.cli.app  # noqa: F401
    drawn, failures = random.Random(arguments.seed), 0
    with tempfile.TemporaryDirectory(prefix="signals-") as root:
        scene = make_scene(Path(root) / "scene").root
        prepare(scene)
        assert wait(start(ARTIFACT, scene, fresh=True), 300) == 0, (scene / "said").read_text()
        for name in arguments.only or COMMANDS:
            seen: list[Seen] = []
            place = copy(scene, Path(root) / "whole")
            begun = time.monotonic()
            code = wait(start(COMMANDS[name], place, fresh=arguments.fresh), 300)
            whole_s = time.monotonic() - begun
            if code != 0:
                print(f"{name}: exit code {code}: {(place / 'said').read_text()[-1500:]}")
                failures += 1
                continue
            for number in range(arguments.count):
                place = copy(scene, Path(root) / "place")
                sent = [drawn.choice(SIGNALS) for _ in range(1 + number % 2)]
                one = disturb(COMMANDS[name], place, drawn.uniform(0, 1.02) * whole_s, sent, fresh=arguments.fresh)
                seen.append(one)
                for wrong in one.wrong:
                    print(f"  {name}, {number}: {wrong}", flush=True)
            stopped = [one for one in seen if one.code == 130]
            wrong = sum(bool(one.wrong) for one in seen)
            failures += wrong
            slowest = max((one.seconds for one in stopped), default=0.0)
            print(
                f"{name:20} {whole_s:6.1f} s whole; {len(seen)} signals, {len(stopped)} of them in time to stop it;"
                f" the slowest end took {slowest:.2f} s; {wrong} wrong",
                flush=True,
            )
    return 1 if failures else 0


def prepare(place: Path) -> None:
    """Empty folders for temporary files and the cache."""
    for name in ("tmp", "cache"):
        (place / name).mkdir(exist_ok=True)
    (place / "said").touch()


def copy(scene: Path, place: Path) -> Path:
    """The scene afresh: nothing made, nothing cached."""
    shutil.rmtree(place, ignore_errors=True)
    shutil.copytree(scene, place, ignore=shutil.ignore_patterns("cache", "tmp", "said"))
    prepare(place)
    return place


if __name__ == "__main__":
    sys.exit(main())
