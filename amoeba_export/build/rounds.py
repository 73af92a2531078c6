"""Exports that run side by side and read their supernet together.

Each export runs in a thread of its own until it knows its plan and needs weights. There it waits. When all that still
run wait, the supernet is read once and every waiting plan is cut from it; then they go on to verify and measure, and
those that missed their budget meet in the next round.

One thread works at a time: measurements must not be disturbed, and loading two models at once in one process breaks
both, because transformers patches torch while it loads.
"""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TypeVar

from amoeba_export.formats.write import Cut, write_cuts
from amoeba_export.ir import Progress, Supernet
from amoeba_export.materialize import stream_subnets
from amoeba_export.pipeline import Cutter

T = TypeVar("T")

STOP_SECONDS = 20.0
"""How long an interrupted build waits for its threads to clean up."""


@dataclass(slots=True)
class _Waiting:
    """A cut that somebody waits for."""

    supernet: Supernet
    cut: Cut
    done: threading.Event = field(default_factory=threading.Event)
    error: BaseException | None = None

    @property
    def source(self) -> tuple[object, ...]:
        """Cuts of equal source can be made in one pass."""
        strategy = self.supernet.strategy.identity if self.supernet.strategy else None
        return (self.supernet.identity, strategy, tuple(one.input for one in self.supernet.adapters))


class Rounds:
    """Runs exports in threads, one of which works at a time."""

    def __init__(self, *, progress: Progress) -> None:
        self._progress = progress
        self._changed = threading.Condition()
        self._is_free = True
        self._broken: BaseException | None = None
        self._active = 0
        self._waiting: list[_Waiting] = []
        self.stopped = threading.Event()

    def run(self, exports: Sequence[Callable[[Cutter], T]], *, done: Callable[[int, T], None]) -> None:
        """Run all. `done` is called in the calling thread with the position and what each returned.

        Raises:
            KeyboardInterrupt: After the threads have left what they were doing.
        """
        finished: list[tuple[int, T]] = []
        threads = [
            threading.Thread(target=self._follow, args=(position, run, finished), daemon=True)
            for position, run in enumerate(exports)
        ]
        self._active = left = len(threads)
        try:
            for thread in threads:
                thread.start()
            while left:
                with self._changed:
                    self._changed.wait_for(lambda: finished or self._active == 0 or self._broken)
                    if self._broken is not None:
                        raise self._broken
                    ready, finished[:] = list(finished), []
                    cuts = self._waiting if self._active == 0 else []
                    if cuts:
                        self._waiting = []
                for position, result in ready:
                    left -= 1
                    done(position, result)
                if cuts:
                    self._cut(cuts)
        except BaseException:
            self._stop(threads)
            raise

    def _follow(self, position: int, run: Callable[[Cutter], T], finished: list[tuple[int, T]]) -> None:
        def cutter(supernet: Supernet, cut: Cut, progress: Progress) -> None:
            waiting = _Waiting(supernet, cut)
            with self._changed:
                self._is_free = True
                self._active -= 1
                self._waiting.append(waiting)
                self._changed.notify_all()
            waiting.done.wait()
            self._take()
            if self.stopped.is_set():
                raise KeyboardInterrupt
            if waiting.error is not None:
                raise waiting.error

        self._take()
        try:
            result = run(cutter)
        except BaseException as error:  # KeyboardInterrupt: the main thread has it already; else it gets it
            with self._changed:
                self._broken = error
                self._changed.notify_all()
            return
        with self._changed:
            self._is_free = True
            finished.append((position, result))
            self._active -= 1
            self._changed.notify_all()

    def _take(self) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._is_free or self.stopped.is_set())
            self._is_free = False

    def _cut(self, waiting: Sequence[_Waiting]) -> None:
        """Cut all that wait, those of one supernet in one pass."""
        groups: dict[tuple[object, ...], list[_Waiting]] = {}
        for one in waiting:
            groups.setdefault(one.source, []).append(one)
        with self._released(waiting):  # not one by one: who goes on measures, and cutting would disturb it
            for group in groups.values():
                self._cut_group(group)

    def _cut_group(self, group: Sequence[_Waiting]) -> None:
        cuts = [one.cut for one in group]
        try:
            stream = stream_subnets(group[0].supernet, [cut.subnet.plan for cut in cuts])
            write_cuts(cuts, stream, progress=self._progress)
        except Exception as error:  # whatever it was, it belongs to the entries that wait; each tells of its own
            if len(group) == 1:
                group[0].error = error
                return
            for one in group:  # whose fault it was shows when each is cut by itself
                _empty(one.cut)
                self._cut_group([one])

    @contextmanager
    def _released(self, group: Sequence[_Waiting]) -> Iterator[None]:
        try:
            yield
        finally:
            with self._changed:
                self._active += len(group)
                for one in group:
                    one.done.set()

    def _stop(self, threads: Sequence[threading.Thread]) -> None:
        with self._changed:
            self.stopped.set()
            for one in self._waiting:
                one.done.set()
            self._changed.notify_all()
        for thread in threads:
            if thread.is_alive():
                thread.join(STOP_SECONDS)


def _empty(cut: Cut) -> None:
    """Remove what a failed pass wrote."""
    for name in cut.dtypes:
        shutil.rmtree(cut.folder / name, ignore_errors=True)
