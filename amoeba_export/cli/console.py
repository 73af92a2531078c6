"""What a user sees: the answer on stdout, as tables or as JSON, and everything said on the way on stderr."""

from __future__ import annotations

import io
import json
import os
import re
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TextIO, cast

from rich.console import Console, ConsoleOptions, Group, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, ProgressColumn, Task, TextColumn
from rich.progress import Progress as Bars
from rich.segment import Segment
from rich.table import Table
from rich.text import Text

from amoeba_export.cli.pace import Pace, keep_pace, last_pace, seconds_left
from amoeba_export.quantities import duration as duration
from amoeba_export.quantities import milliseconds as milliseconds
from amoeba_export.quantities import percent as percent
from amoeba_export.quantities import size as size
from amoeba_export.shown import for_terminal

HEARTBEAT_S = 30.0
"""In a log, long work says this often how far it is."""

SETTLE_S = 0.5
"""Steps that follow each other this fast count together: models that were measured together all report at the end."""

LOG_WIDTH = 10_000
"""Columns of a file or pipe: nothing is folded there."""

WORTH_SAYING_S = 2.0
"""Work that takes less is not mentioned in a log."""


class _Output(Console):
    """A rich console on which no text of a file commands the terminal."""

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        for segment in super().render(renderable, options):
            yield segment if segment.control else Segment(for_terminal(segment.text), segment.style)


class _Trimmed(io.TextIOBase):
    """stdout without the spaces that fill a table's last column."""

    def write(self, text: str) -> int:
        return sys.stdout.write(re.sub(r" +$", "", text, flags=re.MULTILINE))

    def flush(self) -> None:
        sys.stdout.flush()


def answer() -> Console:
    """The console of stdout. A file or pipe gets lines as long as they are, neither cut at 80 columns nor filled up."""
    if sys.stdout.isatty():
        return _Output(highlight=False, markup=False, emoji=False)
    return _Output(highlight=False, markup=False, emoji=False, width=LOG_WIDTH, file=cast(TextIO, _Trimmed()))


def print_json(data: Any) -> None:
    """The answer as JSON, for programs."""
    print(json.dumps(data, indent=2, allow_nan=False), flush=True)


def table(*columns: str, right: tuple[str, ...] = ()) -> Table:
    """An empty table in our style. Columns named in `right` hold figures."""
    made = Table(box=None, pad_edge=False, header_style="dim")
    for column in columns:
        made.add_column(column, justify="right" if column in right else "left", overflow="fold")
    return made


def facts(rows: Mapping[str, str]) -> Table:
    """Names and values, one pair a line."""
    made = Table(box=None, pad_edge=False, show_header=False)
    made.add_column(style="dim", no_wrap=True)
    made.add_column(overflow="fold")
    for name, value in rows.items():
        made.add_row(name, value)
    return made


def titled(title: str, renderable: RenderableType) -> Group:
    """`renderable` under a title; one of rich's own would be folded to the width of its table."""
    return Group(Text(title, style="bold", overflow="fold"), renderable)


class Talk:
    """The listener that commands give to the stages (`ir.Progress`): lines on stderr, bars on a terminal."""

    def __init__(self) -> None:
        self.on_terminal = sys.stderr.isatty() and os.environ.get("TERM") != "dumb"
        self._console = _Output(
            stderr=True,
            highlight=False,
            markup=False,
            emoji=False,
            soft_wrap=True,
            width=None if self.on_terminal else LOG_WIDTH,
        )
        self._bars: Bars | None = None
        self._num_tracks = 0
        self._warned: set[str] = set()
        self._lock = threading.Lock()  # measurements are tracked from a thread of their own

    def note(self, message: str) -> None:
        """One line of talk."""
        self._console.print(message)

    def warn(self, message: str) -> None:
        """One line that should not be missed, and that is not read the second time."""
        if message in self._warned:
            return
        self._warned.add(message)
        self._console.print(f"warning: {message}", style="yellow")

    def error(self, message: str) -> None:
        """What went wrong: the first line stands out."""
        first, _, rest = message.partition("\n")
        self._console.print(f"error: {first}", style="bold red")
        if rest:
            self._console.print(rest)

    def show(self, renderable: RenderableType) -> None:
        """A table among the talk."""
        self._console.print(renderable)

    @contextmanager
    def track(self, description: str, total: int) -> Iterator[Callable[[int], None]]:
        """A bar on a terminal; elsewhere a line when it turns out to take long, one now and then, one at the end.

        Work that took long the last time says so at once. A last run also makes the time that is left hold.
        """
        start = time.monotonic()
        work = _Work(description, total, start, last_pace(description, total))
        with self._bar(work) if self.on_terminal else self._lines(work):
            yield work.advance
        seconds = time.monotonic() - start
        if seconds >= WORTH_SAYING_S:
            self._console.print(f"{description}: {duration(seconds)}", style="dim")
            keep_pace(description, total, [*work.events, (total, seconds)])

    @contextmanager
    def _bar(self, work: _Work) -> Iterator[None]:
        with self._lock:
            if self._bars is None:
                self._bars = Bars(
                    TextColumn("{task.description}"),
                    BarColumn(bar_width=30),
                    MofNCompleteColumn(),
                    _TimeLeft(),
                    console=self._console,
                    transient=True,
                )
                self._bars.start()
            bars = self._bars
            self._num_tracks += 1
        task = bars.add_task(work.description, total=work.total, work=work)
        work.listener = lambda steps: bars.advance(task, steps)
        try:
            yield
        finally:
            bars.remove_task(task)
            with self._lock:
                self._num_tracks -= 1
                if self._num_tracks == 0:
                    bars.stop()
                    self._bars = None

    @contextmanager
    def _lines(self, work: _Work) -> Iterator[None]:
        spoken = work.start
        waiting: list[threading.Timer] = []
        lock = threading.Lock()  # timers speak from threads of their own

        def say(now: float) -> None:
            with lock:
                if waiting and work.done < work.total:
                    left = work.left(now)
                    about = "" if left is None else f", about {duration(left)} left"
                    self._console.print(f"{work.description}: {work.done} of {work.total}{about}")
                waiting.clear()

        def stepped(steps: int) -> None:
            nonlocal spoken
            with lock:
                now = time.monotonic()
                if now - spoken >= HEARTBEAT_S and 0 < work.done < work.total and not waiting:
                    spoken = now
                    waiting.append(_later(SETTLE_S, say, now))

        work.listener = stepped
        opening = f"{work.description} (0 of {work.total})"
        begun = None
        if work.last is not None and work.last.seconds >= WORTH_SAYING_S:
            self._console.print(f"{opening}, {duration(work.last.seconds)} the last time")
        else:  # a timer, because the first step may be the long one
            begun = _later(WORTH_SAYING_S, self._console.print, opening)
        try:
            yield
        finally:
            if begun is not None:
                begun.cancel()
            with lock:
                for timer in waiting:
                    timer.cancel()
                waiting.clear()


class _Work:
    """What is tracked: how far it is, and when it got there."""

    def __init__(self, description: str, total: int, start: float, last: Pace | None) -> None:
        self.description, self.total, self.start, self.last = description, total, start, last
        self.done = 0
        self.events: list[tuple[int, float]] = []
        self.listener: Callable[[int], None] = lambda steps: None
        self._lock = threading.Lock()

    def advance(self, steps: int) -> None:
        """So many more steps are done."""
        with self._lock:
            self.done += steps
            self.events.append((self.done, time.monotonic() - self.start))
        self.listener(steps)

    def left(self, now: float) -> float | None:
        """Seconds, or None where nothing tells."""
        return seconds_left(self.done, self.total, now - self.start, self.last)


class _TimeLeft(ProgressColumn):
    """About how long a bar will still take."""

    max_refresh = 0.5

    def render(self, task: Task) -> Text:
        work: _Work = task.fields["work"]
        left = work.left(time.monotonic()) if work.done < work.total else None
        return Text("" if left is None else f"about {duration(left)} left", style="progress.remaining")


def _later(seconds: float, function: Callable[..., None], argument: object) -> threading.Timer:
    timer = threading.Timer(seconds, function, [argument])
    timer.daemon = True
    timer.start()
    return timer
