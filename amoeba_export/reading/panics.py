"""Panics of libraries that are written in Rust, such as tokenizers: they reach Python as no `Exception`."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator


@contextlib.contextmanager
def panics_as_errors() -> Iterator[None]:
    """Make a panic within a `RuntimeError`, so that handlers of any `Exception` see it.

    PyO3 derives its `PanicException` from `BaseException`, and no module has it by name.
    """
    try:
        yield
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        raise RuntimeError(f"a library panicked ({error})") from error
