"""Reading one file under bounds: two seconds of CPU time, and so much memory beyond what was there before."""

from __future__ import annotations

import contextlib
import resource
import signal
import traceback
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

from amoeba_export.errors import AmoebaError
from tests.fuzz.readers import READERS

CPU_SECONDS = 2.0
MEMORY_BYTES = 500 * 2**20


class OutOfTime(BaseException):
    """Not an `Exception`, so that no reader catches it."""


def violation(reader: str, root: Path, content: bytes) -> str | None:
    """What is wrong with how `reader` takes `content`: None when it succeeds or raises an `AmoebaError`."""
    file = root / READERS[reader].file
    valid = file.read_bytes()
    file.write_bytes(content)
    try:
        with _timed():
            READERS[reader].read(file)
    except AmoebaError as error:
        try:
            str(error).encode()
        except UnicodeEncodeError:
            return f"{type(error).__name__} whose message cannot be printed"
        return "an error that is called a bug" if error.exit_code == 1 and type(error) is not AmoebaError else None
    except OutOfTime as error:
        return f"more than {CPU_SECONDS:g} seconds in {_where(error)}"
    except Exception as error:
        return f"{type(error).__name__} in {_where(error)}: {str(error)[:200]}"
    finally:
        file.write_bytes(valid)
    return None


def _where(error: BaseException) -> str:
    """The last function of the package that an error went through."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "amoeba_export" in frame.filename]
    return f"{Path(frames[-1].filename).name}:{frames[-1].name}" if frames else "outside"


@contextlib.contextmanager
def _timed() -> Iterator[None]:
    """CPU time of this process, which a busy machine does not change."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise OutOfTime

    before = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


@contextlib.contextmanager
def limited_memory() -> Iterator[None]:
    """Inside, this process gets `MEMORY_BYTES` more than it has now; beyond it, memory errors."""
    before, hard = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MEMORY_BYTES, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (before, hard))
