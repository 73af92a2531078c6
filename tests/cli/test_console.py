from __future__ import annotations

import os
import pty
import re
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from amoeba_export.cli import console
from amoeba_export.cli.console import Talk, duration, milliseconds, percent, size
from amoeba_export.cli.pace import Pace, keep_pace, last_pace, seconds_left


def test_talk_is_plain_lines_without_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    talk = Talk()
    talk.note("cutting [bold]24x0.75[/] " + "x" * 200)
    talk.warn("an estimate")
    talk.error("It broke.\n  next:  Mend it.")
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == (
        f"cutting [bold]24x0.75[/] {'x' * 200}\nwarning: an estimate\nerror: It broke.\n  next:  Mend it.\n"
    )


class Later:
    """A clock that stands still, and timers that go off when a test says so."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        self.timers: dict[float, Callable[[], None]] = {}
        monkeypatch.setattr(console.time, "monotonic", lambda: self.now)
        monkeypatch.setattr(console, "_later", self._later)

    def run(self, seconds: float) -> None:
        """Let the timer of so many seconds go off, if there is one."""
        self.timers.pop(seconds, lambda: None)()

    def _later(self, seconds: float, function: Callable[..., None], argument: object) -> threading.Timer:
        self.timers[seconds] = lambda: function(argument)
        return threading.Timer(seconds, function)  # never started, but it can be cancelled


def test_progress_without_a_terminal_is_few_lines(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps that come at once are counted together, or the first of them would foretell hours."""
    later = Later(monkeypatch)
    with Talk().track("Measuring", 20) as advance:
        for _ in range(10):
            later.now += 8
            advance(1)
            advance(1)
            later.run(console.SETTLE_S)
    assert capsys.readouterr().err == (
        "Measuring: 8 of 20, about 48 s left\nMeasuring: 16 of 20, about 16 s left\nMeasuring: 1 min 20 s\n"
    )


def test_nothing_is_said_of_work_that_has_ended(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(console, "HEARTBEAT_S", 0.0)
    later = Later(monkeypatch)
    with Talk().track("Reading", 3) as advance:
        advance(1)
        assert console.SETTLE_S in later.timers
    later.run(console.SETTLE_S)
    assert capsys.readouterr().err == ""


def test_short_work_is_not_mentioned(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    Later(monkeypatch)
    with Talk().track("Reading", 3) as advance:
        advance(3)
    assert capsys.readouterr().err == ""


def test_long_work_says_so_before_its_first_step(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    later = Later(monkeypatch)
    with Talk().track("Reading", 3):
        later.now += console.WORTH_SAYING_S
        later.run(console.WORTH_SAYING_S)
        assert capsys.readouterr().err == "Reading (0 of 3)\n"
    assert capsys.readouterr().err == "Reading: 2.0 s\n"


def test_work_that_took_long_says_so_at_once_and_how_long_is_left(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The first of four steps takes most of the time: the second run knows, and what it says is left holds."""
    monkeypatch.setenv("AMOEBA_CACHE", str(tmp_path))
    later = Later(monkeypatch)
    for _ in range(2):
        with Talk().track("Loading", 4) as advance:
            for seconds in (70, 10, 10, 10):
                later.now += seconds
                advance(1)
                later.run(console.SETTLE_S)
    first, second = capsys.readouterr().err.split("Loading: 1 min 40 s\n")[:2]
    assert first == "Loading: 1 of 4, about 3 min 30 s left\n"
    assert second.startswith("Loading (0 of 4), 1 min 40 s the last time\nLoading: 1 of 4, about 3")
    (left,) = re.findall(r"1 of 4, about (\d+) s left", second)
    assert 25 <= int(left) <= 35, "30 s are left"


def test_a_run_that_failed_is_no_measure(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("AMOEBA_CACHE", str(tmp_path))
    later = Later(monkeypatch)

    def fail() -> None:
        with Talk().track("Loading", 4):
            later.now += 60
            raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        fail()
    assert last_pace("Loading", 4) is None


def test_a_damaged_or_sealed_cache_is_no_reason_to_stop(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("AMOEBA_CACHE", str(tmp_path / "file"))
    (tmp_path / "file").write_text("no folder")
    keep_pace("Loading", 4, [(4, 10.0)])
    assert last_pace("Loading", 4) is None


@pytest.mark.parametrize(
    ("done", "elapsed", "left"),
    [
        pytest.param(0, 0.0, 100.0, id="as long as the last time"),
        pytest.param(0, 40.0, 60.0, id="nothing done, and some of it gone"),
        pytest.param(50, 50.0, 50.0, id="as the last time"),
        pytest.param(50, 100.0, 100.0, id="twice as slow: this run is believed"),
        pytest.param(100, 90.0, 0.0, id="done"),
    ],
)
def test_the_time_left_follows_the_last_run_and_then_this_one(done: int, elapsed: float, left: float) -> None:
    even = Pace(seconds=100.0, marks=tuple(part / 20 for part in range(21)))
    assert seconds_left(done, 100, elapsed, even) == pytest.approx(left)


_BARS = """
import threading
from amoeba_export.cli.pace import Pace, keep_pace, last_pace, seconds_left
from amoeba_export.cli.console import Talk
talk = Talk()
with talk.track("Outer", 2) as outer, talk.track("Inner", 4) as inner:
    inner(1)
    outer(1)
    talk.note("between")
    talk._bars.refresh()  # it does so several times a second, when it gets to it
with talk.track("Later", 2) as advance:
    thread = threading.Thread(target=advance, args=(1,))
    thread.start()
    thread.join()
    talk._bars.refresh()
talk.note("after")
"""


def _on_terminal(code: str) -> str:
    """What a process writes to a terminal of 100 columns."""
    ours, theirs = pty.openpty()
    run = subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=theirs,
        stderr=theirs,
        env=os.environ | {"TERM": "xterm", "COLUMNS": "100", "NO_COLOR": "1"},
    )
    os.close(theirs)
    seen = b""
    reader = threading.Thread(target=run.wait)
    reader.start()
    while True:
        try:
            chunk = os.read(ours, 4096)
        except OSError:  # how a pty says that the other end is closed
            break
        if not chunk:
            break
        seen += chunk
    reader.join()
    os.close(ours)
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", seen.decode())


def test_progress_on_a_terminal_is_bars() -> None:
    seen = _on_terminal(_BARS)
    assert re.search(r"Outer +[━╸]+ +1/2", seen)
    assert re.search(r"Inner +[━╸]+ +1/4", seen)
    assert re.search(r"Later +[━╸]+ +1/2", seen)
    assert "between" in seen
    assert seen.rstrip().endswith("after")


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.04, "0.0 s"), (8.24, "8.2 s"), (9.96, "10 s"), (59.6, "1 min 00 s"), (185, "3 min 05 s"), (7800, "2 h 10 min")],
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


@pytest.mark.parametrize(
    ("size_bytes", "text"),
    [(0, "0 B"), (812, "812 B"), (4096, "4.1 kB"), (538_092_672, "538.1 MB"), (13_500_000_000, "13.5 GB")],
)
def test_sizes(size_bytes: int, text: str) -> None:
    assert size(size_bytes) == text


def test_figures() -> None:
    assert [milliseconds(value) for value in (None, 0.01234, 18.614, 123.4, 4321.0)] == [
        "-",
        "0.01234 ms",
        "18.61 ms",
        "123.4 ms",
        "4321 ms",
    ]
    assert [percent(share) for share in (0.004, 0.04, 0.977, 1.2)] == ["0.4 %", "4 %", "98 %", "120 %"]
