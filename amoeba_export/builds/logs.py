"""What is said while an entry is built: to its log in full, and to the console with the entry's name in front."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import TextIO

from amoeba_export.ir import Progress
from amoeba_export.shown import for_terminal


class Logged:
    """A listener (`ir.Progress`) that writes a log and passes on. Once `stopped` is set, the next word interrupts."""

    def __init__(self, name: str, log: TextIO, to: Progress, stopped: threading.Event) -> None:
        self._name, self._log, self._to, self._stopped = name, log, to, stopped

    def note(self, message: str) -> None:
        """See `Progress`."""
        self.write(message)
        self._to.note(f"{self._name}: {message}")

    def warn(self, message: str) -> None:
        """See `Progress`."""
        self.write(f"warning: {message}")
        self._to.warn(f"{self._name}: {message}")

    @contextmanager
    def track(self, description: str, total: int) -> Iterator[Callable[[int], None]]:
        """See `Progress`."""
        self.write(description)
        with self._to.track(f"{self._name}: {description}", total) as advance:

            def told(steps: int) -> None:
                self._check()
                advance(steps)

            yield told

    def write(self, message: str) -> None:
        """To the log alone."""
        self._check()
        self._log.write(f"{datetime.now(UTC):%H:%M:%S} {for_terminal(message)}\n")
        self._log.flush()

    def _check(self) -> None:
        if self._stopped.is_set():
            raise KeyboardInterrupt


@contextmanager
def open_log(path: Path) -> Iterator[TextIO]:
    """A new log in place of the last one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as log:
        yield log
