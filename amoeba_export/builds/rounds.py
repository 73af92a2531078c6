"""Exports that run side by side and read their supernet together.

Each export runs in a thread of its own until it knows its plan and needs weights. There it waits. When all that still
run wait, the supernet is read once and every waiting plan is cut from it; then they go on to verify and measure, and
those that missed their budget meet in the next round.

What works takes lanes. All of them: what comes before the weights (it may calibrate, and the next export then finds
that in the cache), what measures, which must not be disturbed, and models so large that two of them may not fit in
memory. One lane: verifying and publishing a smaller one. Lanes share out torch's threads: two artifacts, each verified
by one thread, take less time than one after the other by two, which wait for each other at every step, and for a core.
"""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Generic, TypeVar

import torch

from amoeba_export.application.assemble import Cutter
from amoeba_export.formats.write import WriteJob, write_cuts
from amoeba_export.ir import Progress, Supernet
from amoeba_export.materialize import stream_subnets

T = TypeVar("T")

LARGE_PARAMS = 1_000_000_000
"""Subnets of more weights than this are verified one at a time."""

STOP_SECONDS = 1.5
"""How long an interrupted build waits for its threads to clean up: all of it, reports too, is over in seconds."""


@dataclass(frozen=True, slots=True)
class Export(Generic[T]):
    """Something that needs weights cut on its way.

    Attributes:
        run: Does it, with the cutter that it is given.
        measures: Whether it times anything on this machine or a device.
    """

    run: Callable[[Cutter], T]
    measures: bool


@dataclass(slots=True)
class _Waiting:
    """A cut that somebody waits for."""

    supernet: Supernet
    cut: WriteJob
    done: threading.Event = field(default_factory=threading.Event)
    error: BaseException | None = None

    @property
    def source(self) -> tuple[object, ...]:
        """Cuts of equal source can be made in one pass."""
        strategy = self.supernet.strategy.identity if self.supernet.strategy else None
        return (self.supernet.identity, strategy, tuple(one.input for one in self.supernet.adapters))


class Rounds:
    """Runs exports in threads, as many of which work at a time as there are `lanes` for them."""

    def __init__(self, *, lanes: int = 1, progress: Progress) -> None:
        self._progress = progress
        self._changed = threading.Condition()
        self._lanes = self._free = lanes
        self._num_threads = torch.get_num_threads()
        self._broken: BaseException | None = None
        self._active = 0
        self._waiting: list[_Waiting] = []
        self.stopped = threading.Event()

    def run(self, exports: Sequence[Export[T]], *, done: Callable[[int, T], None]) -> None:
        """Run all. `done` is called in the calling thread with the position and what each returned.

        Raises:
            KeyboardInterrupt: After the threads have left what they were doing.
        """
        finished: list[tuple[int, T]] = []
        threads = [
            threading.Thread(target=self._follow, args=(position, export, finished), daemon=True)
            for position, export in enumerate(exports)
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
        finally:
            torch.set_num_threads(self._num_threads)  # of threads yet to come: torch remembers what was set last

    def _follow(self, position: int, export: Export[T], finished: list[tuple[int, T]]) -> None:
        taken = self._take(self._lanes)

        def cutter(supernet: Supernet, cut: WriteJob, progress: Progress) -> None:
            nonlocal taken
            waiting = _Waiting(supernet, cut)
            is_large = cut.subnet.architecture.num_params > LARGE_PARAMS
            with self._changed:
                self._free += taken
                self._active -= 1
                self._waiting.append(waiting)
                self._changed.notify_all()
            waiting.done.wait()
            taken = self._take(self._lanes if export.measures or is_large else 1)
            if self.stopped.is_set():
                raise KeyboardInterrupt
            if waiting.error is not None:
                raise waiting.error

        try:
            result = export.run(cutter)
        except BaseException as error:  # KeyboardInterrupt: the main thread has it already; else it gets it
            with self._changed:
                self._broken = error
                self._changed.notify_all()
            return
        with self._changed:
            self._free += taken
            finished.append((position, result))
            self._active -= 1
            self._changed.notify_all()

    def _take(self, num_lanes: int) -> int:
        """Wait for so many lanes, and give this thread their share of torch's threads. Returns `num_lanes`."""
        with self._changed:
            self._changed.wait_for(lambda: self._free >= num_lanes or self.stopped.is_set())
            self._free -= num_lanes
        torch.set_num_threads(max(1, self._num_threads * num_lanes // self._lanes))
        return num_lanes

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
        end = time.monotonic() + STOP_SECONDS
        for thread in threads:
            if thread.is_alive():
                thread.join(max(0.0, end - time.monotonic()))


def _empty(cut: WriteJob) -> None:
    """Remove what a failed pass wrote."""
    for name in cut.dtypes:
        shutil.rmtree(cut.folder / name, ignore_errors=True)
