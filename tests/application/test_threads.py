"""`amoeba profile --threads sweep`: the number of threads that runs the full model fastest."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from amoeba_export.application import threads as module
from amoeba_export.application.threads import Tried, choose, sweep_threads
from amoeba_export.backends import Subject
from amoeba_export.backends.targets import over_ssh, read_target, with_threads
from amoeba_export.errors import TargetError, UsageError
from amoeba_export.ir import Latency, Target, Timing, Workload
from tests.backends import llama_bench
from tests.backends.models import FULL
from tests.conftest import Run
from tests.listener import Listener

TIMES_MS = {1: 9.0, 2: 5.0, 4: 6.5, 6: 7.0}
"""A board on which two threads beat four."""


@pytest.fixture
def board(monkeypatch: pytest.MonkeyPatch) -> list[Target]:
    """Six cores with these times; every target that is measured there."""
    seen: list[Target] = []

    class Backend:
        @staticmethod
        def describe(target: Target) -> dict[str, str]:
            return {"cores": "6"}

    def measured(subjects: Sequence[Subject], workload: Workload, *, target: Target, **kwargs: Any) -> list[Latency]:
        seen.append(target)
        options = target.options.get("options", target.options)
        timing = Timing(p50_ms=TIMES_MS[options["threads"]], p90_ms=10, num_samples=1)
        return [Latency(decode=timing, prefill=timing, source="measured", workload=workload)]

    monkeypatch.setattr(module, "find_backend", lambda name: Backend)
    monkeypatch.setattr(module, "measure_latency", measured)
    return seen


@pytest.mark.parametrize("host", [None, "me@board"])
def test_two_threads_beat_four(host: str | None, board: list[Target]) -> None:
    target, listener = read_target("llamacpp-cpu"), Listener()
    if host:
        target = over_ssh(target, host)
    found = sweep_threads(target, FULL.dense, Workload(), dtype="int4", progress=listener)
    assert [one.options.get("options", one.options)["threads"] for one in board] == [1, 2, 4, 6]
    assert found == with_threads(target, 2)
    assert found.options.get("options", found.options) == {"gpu_layers": 0, "threads": 2}
    assert listener.notes[1] == "2 threads: decode of the full model takes 5.000 ms."
    assert listener.notes[-1] == ("llamacpp-cpu is measured with 2 threads. To keep this, add to its file: threads = 2")


@pytest.mark.parametrize(
    ("facts", "said"),
    [({}, ""), ({"cores": "many"}, " (it reports 'many')"), ({"cores": "0"}, " (it reports '0')")],
)
def test_a_target_that_does_not_say_its_cores_is_not_swept(
    facts: dict[str, str], said: str, board: list[Target], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "find_backend", lambda name: SimpleNamespace(describe=lambda target: facts))
    with pytest.raises(TargetError) as caught:
        sweep_threads(read_target("llamacpp-cpu"), FULL.dense, Workload(), dtype="int4")
    assert str(caught.value) == (
        f"The target 'llamacpp-cpu' does not report its number of cores{said}, so a sweep has no numbers of threads to "
        "try.\n"
        "  next:  Give the number yourself: --threads N."
    )
    assert board == []


def test_of_equals_the_fewest_threads_are_taken() -> None:
    assert choose([Tried(1, 8.0), Tried(2, 5.05), Tried(4, 5.0)]) == 2
    assert choose([Tried(1, 8.0), Tried(2, 5.2), Tried(4, 5.0)]) == 4


def test_a_target_without_threads_is_refused() -> None:
    with pytest.raises(UsageError, match="backend 'command' of target 'x' has no threads to choose"):
        with_threads(Target(name="x", description="", backend="command"), 2)


def test_the_table_is_of_the_threads_that_were_asked_for(
    amoeba: Callable[..., Run], tiny_dirs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a llama-bench that is none."""
    program = tmp_path / "llama-bench"
    program.write_text(f"#!/bin/sh\nexec '{sys.executable}' '{llama_bench.__file__}' \"$@\"\n")
    program.chmod(0o755)
    target = tmp_path / "board.toml"
    target.write_text(
        'description = "x"\nbackend = "llamacpp"\ndtype = "int8"\nformats = ["gguf"]\nalign = 32\n'
        f'[options]\nbinary = "{program}"\n'
    )
    table = tmp_path / "table.json"
    words = ("profile", tiny_dirs["llama"], "--target", target, "--out", table, "--prompt", 8, "--generate", 8)
    run = amoeba(*words, "--threads", 3)
    assert run.code == 0, run.err
    assert '"threads": "3"' in table.read_text()
    assert amoeba(*words, "--threads", "many").code == 2
    assert amoeba(*words, "--threads", "0").code == 2
