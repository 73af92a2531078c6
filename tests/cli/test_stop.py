"""A signal ends a command within seconds, and nothing of it stays."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from amoeba_export import leftovers
from amoeba_export.artifact import Staging
from amoeba_export.cli import stop
from amoeba_export.cli.stop import stoppable
from tests.conftest import Run

SAYS = "Interrupted. Nothing half-written is left.\n"
SIGNALS = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]


@pytest.fixture(params=SIGNALS)
def number(request: pytest.FixtureRequest) -> Iterator[signal.Signals]:
    """A signal that is not ignored: a job in the background of a shell ignores SIGINT."""
    usual = signal.default_int_handler if request.param == signal.SIGINT else signal.SIG_DFL
    inherited = signal.signal(request.param, usual)
    yield request.param
    signal.signal(request.param, inherited)


def test_a_signal_interrupts(amoeba: Callable[..., Run], command: Any, number: signal.Signals) -> None:
    def work() -> None:
        os.kill(os.getpid(), number)
        threading.Event().wait()

    usual = signal.getsignal(number)
    command(work)
    assert amoeba("work") == Run(130, "", SAYS)
    assert signal.getsignal(number) is usual


def test_a_second_signal_does_not_disturb_the_cleaning_up(
    amoeba: Callable[..., Run], command: Any, number: signal.Signals
) -> None:
    cleaned = []

    def work() -> None:
        try:
            os.kill(os.getpid(), number)
            threading.Event().wait()
        finally:
            os.kill(os.getpid(), number)
            cleaned.append(True)

    command(work)
    assert amoeba("work") == Run(130, "", SAYS)
    assert cleaned == [True]


def test_an_interrupt_in_a_finalizer_is_raised_again(
    amoeba: Callable[..., Run], command: Any, number: signal.Signals
) -> None:
    class Finalized:
        def __del__(self) -> None:
            os.kill(os.getpid(), number)
            threading.Event().wait(0.001)  # the handler runs here, and what it raises goes no further

    def work() -> None:
        for _ in range(3):
            Finalized()
        threading.Event().wait()

    command(work)
    assert amoeba("work") == Run(130, "", SAYS)


def test_other_errors_in_a_finalizer_are_said(amoeba: Callable[..., Run], command: Any) -> None:
    said = []
    usual, sys.unraisablehook = sys.unraisablehook, lambda unraisable: said.append(unraisable.exc_type)

    class Finalized:
        def __del__(self) -> None:
            raise RuntimeError

    try:
        command(lambda: (Finalized(), None)[1])
        assert amoeba("work").code == 0
    finally:
        sys.unraisablehook = usual
    assert said == [RuntimeError]


def test_an_interrupt_that_a_library_made_something_else_of(
    amoeba: Callable[..., Run], command: Any, number: signal.Signals
) -> None:
    def work() -> None:
        try:
            os.kill(os.getpid(), number)
            threading.Event().wait()
        except KeyboardInterrupt:
            raise ModuleNotFoundError("Could not import module") from None

    command(work)
    assert amoeba("work") == Run(130, "", SAYS)
    command(lambda: None)
    assert amoeba("rest").code == 0


def test_a_signal_that_is_ignored_stays_ignored(amoeba: Callable[..., Run], command: Any) -> None:
    inherited = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # nohup
    try:
        command(lambda: os.kill(os.getpid(), signal.SIGHUP))
        assert amoeba("work") == Run(0, "", "")
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, inherited)


def test_an_interrupt_that_is_lost_is_heard_of(monkeypatch: pytest.MonkeyPatch, number: signal.Signals) -> None:
    monkeypatch.setattr(stop, "GRACE_S", 0.0)
    late = threading.Event()
    with stoppable(late.set):
        try:
            os.kill(os.getpid(), number)
            threading.Event().wait()
        except KeyboardInterrupt:
            assert late.wait()  # for ever, if nobody heard


def test_temporary_files_go_with_the_command() -> None:
    before = tempfile.gettempdir()
    with stoppable():
        inside = Path(tempfile.mkdtemp())
        assert inside.parent.parent == Path(before)
    assert not inside.parent.exists()
    assert tempfile.gettempdir() == before


def test_what_is_noted_is_removed_latest_first_whatever_fails() -> None:
    done = []

    def fails() -> None:
        raise OSError

    kept = leftovers.note(lambda: done.append("kept"))
    for removal in (lambda: done.append("first"), fails, lambda: done.append("last")):
        leftovers.note(removal)
    leftovers.forget(kept)
    leftovers.remove_all()
    assert done == ["last", "first"]


def test_a_staging_folder_and_its_parents_can_be_removed_from_outside(tmp_path: Path) -> None:
    with Staging(tmp_path / "a" / "b" / "out") as staging:
        (staging.folder / "half").write_text("x")
        leftovers.remove_all()
        assert list(tmp_path.iterdir()) == []


def test_what_does_not_stop_is_ended(tmp_path: Path) -> None:
    program = f"""
import contextlib, os, signal, sys, tempfile, threading
from pathlib import Path
from amoeba_export.artifact import Staging
from amoeba_export.cli import app, stop
from amoeba_export.cli.entry import entry

def hang():
    with Staging(Path({str(tmp_path / "made" / "out")!r})) as staging:
        (staging.folder / "half").write_text("x")
        tempfile.mkdtemp()
        while True:
            with contextlib.suppress(KeyboardInterrupt):
                os.kill(os.getpid(), signal.SIGTERM)
                threading.Event().wait()

stop.GRACE_S = 0.0
app.app.command("hang")(hang)
sys.argv[1:] = ["hang"]
entry()
"""
    (tmp_path / "tmp").mkdir()
    run = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"TMPDIR": str(tmp_path / "tmp")},
    )
    assert (run.returncode, run.stdout, run.stderr) == (130, "", SAYS)
    assert [path.name for path in tmp_path.iterdir()] == ["tmp"]
    assert list((tmp_path / "tmp").iterdir()) == []
