"""How a command ends early: Ctrl-C, SIGTERM and SIGHUP all interrupt it, and it is over within seconds.

The first signal raises `KeyboardInterrupt` in the main thread, and everything on the way out cleans up; later ones add
nothing. Raised in a finalizer or a callback of native code, it would be printed and dropped there, and the command
would go on: then it is raised again. An interrupt can also come too late (native code runs on for minutes) or be
caught by somebody. So a thread hears of the signal as well. If the command is not over `GRACE_S` later, the thread
removes what the process would leave behind and ends it.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Collection, Iterator
from types import FrameType
from typing import NoReturn

from amoeba_export import leftovers

INTERRUPTED = 130
"""The exit code of whatever signal it was."""

SAYS = "Interrupted. Nothing half-written is left."

GRACE_S = 3.0
"""How long cleaning up may take."""

_LOOK_S = 0.02
"""How often it is looked whether the interrupt was dropped."""

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_OVER = 0
"""What the thread reads when the command is over; no signal has this number."""


_came = threading.Event()
"""Set by the first signal. Signals are the process's, and so is this."""


def was_interrupted() -> bool:
    """Whether a signal has come. Libraries make other errors of an interrupt: a module that cannot be imported, say."""
    return _came.is_set()


def leave() -> NoReturn:
    """End the process now: it waits neither for threads that still compute nor for exit handlers."""
    leftovers.remove_all()
    os._exit(INTERRUPTED)


@contextlib.contextmanager
def stoppable(late: Callable[[], None] | None = None) -> Iterator[None]:
    """While a command runs in the main thread, signals stop it. In another thread no handler can be set.

    Args:
        late: What is done when the command is not over in time; None to end the process.
    """
    usual = (signal.SIG_DFL, signal.default_int_handler)  # nohup ignores SIGHUP, a shell's job SIGINT: so do we
    before = {number: handler for number in _SIGNALS if (handler := signal.getsignal(number)) in usual}
    if not before or threading.current_thread() is not threading.main_thread():
        yield
        return
    over, dropped = threading.Event(), threading.Event()

    def interrupt(number: int, frame: FrameType | None) -> None:
        if over.is_set() or (_came.is_set() and not dropped.is_set()):
            return
        _came.set()
        dropped.clear()
        raise KeyboardInterrupt

    heard, told = os.pipe()
    os.set_blocking(told, False)
    ends = (over, dropped, late or _say_and_leave)
    watch = threading.Thread(target=_watch, args=(heard, before, *ends), daemon=True)
    watch.start()
    wakeup = signal.set_wakeup_fd(told, warn_on_full_buffer=False)  # written to even while native code runs
    for number in before:
        signal.signal(number, interrupt)
    try:
        with _own_temporary_folder(), _noticing_what_is_dropped(dropped):
            try:
                yield
            finally:
                over.set()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(wakeup)
        os.write(told, bytes([_OVER]))
        watch.join()
        _came.clear()
        os.close(heard)
        os.close(told)


def _watch(
    heard: int, ours: Collection[int], over: threading.Event, dropped: threading.Event, late: Callable[[], None]
) -> None:
    while number := os.read(heard, 1)[0]:
        if number not in ours:
            continue
        end = time.monotonic() + GRACE_S
        while not over.wait(_LOOK_S):
            if time.monotonic() >= end:
                late()
                return
            if dropped.is_set():
                signal.pthread_kill(threading.main_thread().ident or 0, number)


@contextlib.contextmanager
def _noticing_what_is_dropped(dropped: threading.Event) -> Iterator[None]:
    """Where Python cannot raise an exception any further, it calls a hook, which is where we learn of it."""
    usual = sys.unraisablehook

    def hook(unraisable: sys.UnraisableHookArgs) -> None:
        if unraisable.exc_type is KeyboardInterrupt and _came.is_set():
            dropped.set()
        else:
            usual(unraisable)

    sys.unraisablehook = hook
    try:
        yield
    finally:
        sys.unraisablehook = usual


def _say_and_leave() -> NoReturn:
    with contextlib.suppress(OSError):
        if select.select([], [2], [], 0)[1]:  # a pipe that nobody empties would hold us up
            os.write(2, f"{SAYS}\n".encode())
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # what the main thread says of files that vanish is no news
    leave()


@contextlib.contextmanager
def _own_temporary_folder() -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):  # whoever needs temporary files will say so
            stack.enter_context(leftovers.temporary_folder())
        yield
