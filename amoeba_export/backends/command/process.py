"""One command: run it to its end or to its limit, keep what it prints, leave nothing of it running."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import IO

from amoeba_export import leftovers

MOST_BYTES = 16 * 2**20
"""That a command may print: a benchmark prints a page."""

SHOWN_LINES = 5
SHOWN_CHARACTERS = 200
"""What an error shows of them."""


@dataclass(frozen=True, kw_only=True)
class Ran:
    """A command that ended by itself, with code 0."""

    stdout: str
    stderr: str
    seconds: float


class Broke(Exception):
    """A command that did not: `reason` in words, and the last lines that it printed."""

    def __init__(self, words: Sequence[str], reason: str, printed: str = "", *, late: bool = False) -> None:
        super().__init__(reason)
        self.words, self.reason, self.printed, self.late = tuple(words), reason, printed, late


def last_lines(*texts: str) -> str:
    """The last lines of the first text that has any, marked so that they are not taken for ours."""
    for text in texts:
        lines = [line.rstrip() for line in text[-MOST_BYTES:].splitlines() if line.strip()]
        if lines:
            return "\n".join(f"  | {line[:SHOWN_CHARACTERS]}" for line in lines[-SHOWN_LINES:])
    return ""


def run_words(words: Sequence[str], *, limit_s: float) -> Ran:
    """Run a command. It reads nothing; it and whatever it started are gone when this returns.

    Raises:
        Broke: It cannot be started, takes longer than `limit_s`, prints without end, or ends with another code than 0.
    """
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as complaints:
        start = time.monotonic()
        try:
            # Files, not pipes: a server that the command leaves behind on purpose, as adb does, keeps a pipe open.
            process = subprocess.Popen(
                list(words), stdin=subprocess.DEVNULL, stdout=out, stderr=complaints, start_new_session=True
            )
        except OSError as error:
            raise Broke(words, f"'{words[0]}' cannot be started ({error.strerror})") from error
        noted = leftovers.note(lambda: _kill(process))
        try:
            problem, late = _wait(process, (out, complaints), start + limit_s), False
            if problem is None and process.returncode is None:
                problem, late = f"it took longer than {limit_s:g} s", True
        finally:
            seconds = time.monotonic() - start
            _kill(process)
            process.wait()
            leftovers.forget(noted)
        stdout, stderr = _text(out), _text(complaints)
    problem = problem or _ending(process.returncode)
    if problem:
        raise Broke(words, problem, last_lines(stderr, stdout), late=late)
    return Ran(stdout=stdout, stderr=stderr, seconds=seconds)


def _wait(process: subprocess.Popen[bytes], files: Sequence[IO[bytes]], deadline: float) -> str | None:
    """Wait for the end or the deadline. Says why it cannot wait so long."""
    while (left_s := deadline - time.monotonic()) > 0:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=min(left_s, 0.2))
            break
        if sum(os.fstat(file.fileno()).st_size for file in files) > MOST_BYTES:
            return f"it printed more than {MOST_BYTES >> 20} MiB"
    return None


def _ending(code: int) -> str | None:
    if code < 0:
        return f"it was ended by {signal.Signals(-code).name}"
    return f"it ended with code {code}" if code else None


def _kill(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):  # macOS: a group of which nobody is left to kill
        os.killpg(process.pid, signal.SIGKILL)


def _text(file: IO[bytes]) -> str:
    file.seek(0)
    return file.read(MOST_BYTES).decode(errors="replace")
