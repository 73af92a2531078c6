"""What this process must not leave behind when it is ended without unwinding.

Whoever makes such a thing cleans up after itself. It is noted here as well, for the moment when a signal has come and
the thread that should clean up does not get to it: it computes in native code, or waits for something that hangs.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

_numbers = itertools.count(1)
_removals: dict[int, Callable[[], None]] = {}


def note(removal: Callable[[], None]) -> int:
    """Remember how something is removed. The number is for `forget`."""
    number = next(_numbers)
    _removals[number] = removal
    return number


def forget(number: int) -> None:
    """It is removed, or meant to stay."""
    _removals.pop(number, None)


def remove_all() -> None:
    """Remove everything that is noted, the latest first. Only for a process that ends at once: others still write."""
    while _removals:
        with contextlib.suppress(Exception):  # the others have to go all the same
            _removals.popitem()[1]()


@contextlib.contextmanager
def temporary_folder() -> Iterator[Path]:
    """All temporary files of this process, those of libraries too, and of processes that it starts, in one folder.

    The folder goes when the context ends, when `remove_all` is called, and when the process is killed.

    Raises:
        OSError: None can be made.
    """
    before, variable = tempfile.tempdir, os.environ.get("TMPDIR")
    folder = Path(tempfile.mkdtemp(prefix="amoeba-"))
    noted = note(lambda: remove_folder(folder))
    with contextlib.ExitStack() as stack:
        stack.callback(forget, noted)
        stack.callback(remove_folder, folder)
        stack.enter_context(_removed_after_a_kill(folder))
        tempfile.tempdir = os.environ["TMPDIR"] = str(folder)
        try:
            yield folder
        finally:
            tempfile.tempdir = before
            if variable is None:
                os.environ.pop("TMPDIR", None)
            else:
                os.environ["TMPDIR"] = variable


_WATCH = 'exec 3<&0; { while read -r line; do :; done; rm -rf -- "$1" "$1.gone"; } <&3 &'
"""Waits in the background for the end of stdin, which is the end of who holds the other side."""


@contextlib.contextmanager
def _removed_after_a_kill(folder: Path) -> Iterator[None]:
    """A shell that is nobody's child waits for this process to end, and removes `folder`."""
    heard, held = os.pipe()
    try:
        try:
            with contextlib.suppress(OSError):  # no shell: a kill leaves the folder
                subprocess.run(
                    ["/bin/sh", "-c", _WATCH, "amoeba", str(folder)],
                    stdin=heard,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                    env={"PATH": os.defpath},
                    cwd="/",
                    start_new_session=True,  # signals from a terminal are not for it
                    check=False,
                )
        finally:
            os.close(heard)
        yield
    finally:
        os.close(held)


def remove_folder(folder: Path) -> None:
    """Remove a folder whose name ends in something random, as far as that is possible, at once for who writes there."""
    gone = folder.with_name(f"{folder.name}.gone")
    with contextlib.suppress(OSError):
        folder.rename(gone)
    shutil.rmtree(gone, ignore_errors=True)
    shutil.rmtree(folder, ignore_errors=True)
