"""How a stage tells what it is doing without knowing who listens."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol


class Progress(Protocol):
    """A listener for long work. The console implements it with bars and lines on stderr; `SILENT` drops everything."""

    def note(self, message: str) -> None:
        """One line of talk, such as a resolved decision."""

    def warn(self, message: str) -> None:
        """One line that the user should not miss."""

    def track(self, description: str, total: int) -> AbstractContextManager[Callable[[int], None]]:
        """A context whose value is called with the number of steps done."""


class _Silent:
    def note(self, message: str) -> None:
        pass

    def warn(self, message: str) -> None:
        pass

    @contextmanager
    def track(self, description: str, total: int) -> Iterator[Callable[[int], None]]:
        yield lambda steps: None


SILENT: Progress = _Silent()
