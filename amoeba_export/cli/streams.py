"""stdout and stderr that end no work: a reader that has gone, a closed stream, letters that a stream cannot show."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import sys
from collections.abc import Iterable, Iterator
from typing import Any, TextIO, cast

_NOBODY_READS = (errno.EPIPE, errno.EIO, errno.EBADF)
"""A pipe whose reader has gone, a terminal that has, a descriptor that was closed under us."""


class _Forgiving:
    """A stream that drops what nobody can read any more; everything else it leaves to the one it wraps.

    `head` has seen enough, a terminal is gone: the work goes on, and its exit code tells how it went. On stderr that
    holds for every failure. An answer on stdout that is lost otherwise, on a full disk say, is an error.
    """

    def __init__(self, stream: TextIO, *, whatever_fails: bool) -> None:
        self._stream = stream
        self._whatever_fails = whatever_fails

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except OSError as error:
            self._drop(error)
            return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError as error:
            self._drop(error)

    def _drop(self, error: OSError) -> None:
        # What is still buffered goes nowhere in any case, or the interpreter would try once more on its way out.
        with contextlib.suppress(OSError, ValueError):
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, self._stream.fileno())
            os.close(null)
        if not self._whatever_fails and error.errno not in _NOBODY_READS:
            raise error

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextlib.contextmanager
def forgiving_streams() -> Iterator[None]:
    """While a command runs, its streams are as the module's docstring says."""
    _open_closed_descriptors()
    out, err = sys.stdout, sys.stderr
    with _showing_everything(out, 1) as shown_out, _showing_everything(err, 2) as shown_err:
        sys.stdout = cast(TextIO, _Forgiving(shown_out, whatever_fails=False))
        sys.stderr = cast(TextIO, _Forgiving(shown_err, whatever_fails=True))
        try:
            yield
        finally:
            sys.stdout, sys.stderr = out, err


def _open_closed_descriptors() -> None:
    """`>&-` closes a descriptor: the next file that is opened would be taken for stdout."""
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # the lowest number that is free: this one


@contextlib.contextmanager
def _showing_everything(stream: TextIO | None, descriptor: int) -> Iterator[TextIO]:
    """`stream`, one on `descriptor` where there is none; letters that its encoding does not have are spelled out."""
    if stream is None:  # how Python says that the descriptor was closed
        with open(descriptor, "w", encoding="utf-8", errors="backslashreplace", closefd=False) as opened:
            yield opened
    elif isinstance(stream, io.TextIOWrapper):
        before = stream.errors
        stream.reconfigure(errors="backslashreplace")
        try:
            yield stream
        finally:
            stream.reconfigure(errors=before)
    else:
        yield stream
