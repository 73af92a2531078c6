from __future__ import annotations

import contextlib
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from amoeba_export import backends
from amoeba_export.backends import Availability, Subject, measure_latency
from amoeba_export.backends.targets import Strict
from amoeba_export.errors import MeasurementFailed, TargetError, TargetUnavailable
from amoeba_export.ir import Latency, Target, Timing, Workload
from tests.backends.models import FULL, SHORT

TARGET = Target(name="bench", description="", backend="faulty")

REASONS = {
    "crash": "its process crashed with SIGABRT",
    "killed": "its process was killed, as happens when memory runs out",
    "exit": "its process ended with code 3 and no answer",
    "raise": "RuntimeError: no kernel for this node",
    "memory": "it ran out of memory",
    "nan": "decode took nan ms, which cannot be",
    "negative": "decode took -1.0 ms, which cannot be",
    "zero": "decode took 0.0 ms, which cannot be",
}


@pytest.fixture(autouse=True)
def _faulty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(backends.BACKENDS, "faulty", "tests.backends.faulty:BACKEND")  # type: ignore[arg-type]


def subject(label: str) -> Subject:
    return Subject(dense=FULL.dense, label=label)


def test_a_failing_subject_has_its_own_error_and_the_others_their_latency() -> None:
    labels = ["fine", *REASONS, "noise on stdout"]
    results = measure_latency([subject(label) for label in labels], SHORT, target=TARGET, rounds=2, time_limit_s=600)
    for label, result in zip(labels, results, strict=True):
        if label in REASONS:
            assert isinstance(result, MeasurementFailed), label
            assert result.exit_code == 6
            assert result.what == f"Measuring {label} on 'bench' failed: {REASONS[label]}."
        else:
            assert isinstance(result, Latency), label
            assert result.decode.p50_ms == pytest.approx(2)
            assert result.prefill.p50_ms == pytest.approx(10)
            assert result.decode.noise == 0.0


def test_a_subject_that_hangs_costs_its_time_limit() -> None:
    for time_limit_s in (2, 20, 200, 2000):
        with contextlib.suppress(TargetUnavailable):  # the machine is too busy to say in time what it is
            (result,) = measure_latency([subject("hang")], SHORT, target=TARGET, rounds=2, time_limit_s=time_limit_s)
            break
    assert isinstance(result, MeasurementFailed)
    assert result.what == f"Measuring hang on 'bench' failed: it took longer than {time_limit_s} s."


def test_a_failed_subject_is_not_tried_again() -> None:
    """Rounds of a model that hangs would cost its time limit each."""
    from amoeba_export.backends.runner.supervise import run_job

    job = {
        "engine": "tests.backends.faulty",
        "options": {},
        "workload": {"prompt_tokens": 8, "generate_tokens": 8, "batch": 1},
        "rounds": 3,
        "time_limit_s": 600,
        "subjects": [{"id": 0, "folder": "", "behaviour": "raise"}, {"id": 1, "folder": "", "behaviour": "fine"}],
    }
    events = [(event["event"], event.get("id"), event.get("round")) for event in run_job(job)]
    assert events == [
        ("device", None, None),
        ("failure", 0, 0),
        ("result", 1, 0),
        ("result", 1, 1),
        ("result", 1, 2),
        ("done", None, None),
    ]


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_what_fails_in_company_is_tried_alone(tmp_path: Path) -> None:
    """There may have been no memory for all of them: that is no result."""
    from amoeba_export.backends.runner.supervise import run_job

    subject = {"folder": str(tmp_path), "memory_mb": 1}
    job = {
        "engine": "tests.backends.faulty",
        "options": {},
        "workload": {},
        "rounds": 1,
        "time_limit_s": 600,
        "subjects": [{**subject, "id": 0, "behaviour": "open"}, {**subject, "id": 1, "behaviour": "solitary"}],
    }
    events = [event["event"] for event in run_job(job)]
    assert events == ["device", "result", "result", "done"]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_measuring_process_ends_with_the_one_that_asked(tmp_path: Any) -> None:
    script = tmp_path / "ask.py"
    script.write_text(
        "from amoeba_export.backends.runner.supervise import Child\n"
        "request = {'engine': 'tests.backends.faulty', 'options': {}, 'workload': {},\n"
        "           'subject': {'behaviour': 'hang'}}\n"
        "child = Child('--measure', 100)\n"
        "child.ask(request)\n"
        "child.ask({'phase': 'decode', 'turn': 0})\n"
    )
    asking = subprocess.Popen([sys.executable, str(script)])
    child = _child_of(asking.pid)
    asking.kill()
    asking.wait()
    _wait_until_gone(child)


def _child_of(pid: int) -> int:
    for _ in range(12_000):
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        if children:
            time.sleep(0.5)
            return int(children[0])
        time.sleep(0.05)
    raise AssertionError("no measuring process was started")


def _wait_until_gone(pid: int) -> None:
    for _ in range(12_000):
        status = Path(f"/proc/{pid}/status")
        if not status.exists() or "State:\tZ" in status.read_text():
            return
        time.sleep(0.05)
    raise AssertionError(f"process {pid} outlived its parent")


class PlugIn:
    """A backend of somebody else, as an entry point would bring it."""

    source = "measured"
    containers = ()
    options_model = Strict
    ok = True
    outcome: Any = None

    def check(self, target: Target) -> Availability:
        return Availability(ok=self.ok, reason="the board is off", next_step="Switch it on.")

    def describe(self, target: Target) -> Mapping[str, str]:
        return {}

    def measure(self, subjects: Sequence[Subject], workload: Workload, **settings: Any) -> list[Latency | TargetError]:
        if isinstance(self.outcome, BaseException):
            raise self.outcome
        if self.outcome == "hang":
            time.sleep(30)
        return self.outcome  # type: ignore[no-any-return]


@pytest.fixture
def plug_in(monkeypatch: pytest.MonkeyPatch) -> PlugIn:
    found = PlugIn()
    monkeypatch.setattr(backends, "find_backend", lambda name: found)
    return found


PLUGGED = Target(name="board", description="", backend="theirs")


def test_a_plug_in_that_is_not_available(plug_in: PlugIn) -> None:
    plug_in.ok = False
    with pytest.raises(TargetUnavailable) as caught:
        measure_latency([FULL], SHORT, target=PLUGGED)
    assert str(caught.value) == "Target 'board' cannot be used: the board is off.\n  next:  Switch it on."


def test_a_plug_in_that_raises(plug_in: PlugIn) -> None:
    plug_in.outcome = ZeroDivisionError("division by zero")
    with pytest.raises(TargetError, match="The backend 'theirs' failed: ZeroDivisionError: division by zero"):
        measure_latency([FULL], SHORT, target=PLUGGED)


def test_a_plug_in_that_raises_our_errors_keeps_them(plug_in: PlugIn) -> None:
    plug_in.outcome = TargetUnavailable("no cable", "Plug it in.")
    with pytest.raises(TargetUnavailable, match=r"No cable\."):
        measure_latency([FULL], SHORT, target=PLUGGED)


def test_a_plug_in_that_hangs(plug_in: PlugIn, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "SPARE_S", 0.1)
    plug_in.outcome = "hang"
    with pytest.raises(TargetError, match=r"The backend 'theirs' gave no answer within 0 s\."):
        measure_latency([FULL], SHORT, target=PLUGGED, time_limit_s=0.1, rounds=1)


@pytest.mark.parametrize("value", [float("nan"), -3.0, 0.0, float("inf")])
def test_a_plug_in_whose_times_cannot_be(plug_in: PlugIn, value: float) -> None:
    timing = Timing(p50_ms=value, p90_ms=1.0, num_samples=1)
    plug_in.outcome = [Latency(decode=timing, prefill=timing, source="measured", workload=SHORT)]
    (result,) = measure_latency([FULL], SHORT, target=PLUGGED)
    assert isinstance(result, MeasurementFailed)
    assert result.what == f"Measuring full on 'board' failed: decode took {value} ms, which cannot be."


def test_a_plug_in_that_forgets_a_result(plug_in: PlugIn) -> None:
    plug_in.outcome = []
    with pytest.raises(TargetError, match="gave 0 results for 1 models"):
        measure_latency([FULL], SHORT, target=PLUGGED)
