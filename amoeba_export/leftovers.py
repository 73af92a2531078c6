"""What this process must not leave behind when it is ended without unwinding.

Whoever makes such a thing cleans up after itself. It is noted here as well, for the moment when a signal has come and
the thread that should clean up does not get to it: it computes in native code, or waits for something that hangs.
"""

from __future__ import annotations

import contextlib
import itertools
import shutil
from collections.abc import Callable
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


def remove_folder(folder: Path) -> None:
    """Remove a folder whose name ends in something random, as far as that is possible, at once for who writes there."""
    gone = folder.with_name(f"{folder.name}.gone")
    with contextlib.suppress(OSError):
        folder.rename(gone)
    shutil.rmtree(gone, ignore_errors=True)
    shutil.rmtree(folder, ignore_errors=True)
