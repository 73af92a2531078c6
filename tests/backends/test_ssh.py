"""Against a real OpenSSH server: what is measured, what is trusted, what is left behind."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from amoeba_export import ExportRequest, export
from amoeba_export.backends import measure_latency
from amoeba_export.backends import ssh as ssh_backend
from amoeba_export.backends.connection import Host
from amoeba_export.backends.targets import over_ssh, read_target
from amoeba_export.errors import InputError, TargetUnavailable
from amoeba_export.ir import Latency, Target
from tests.backends import llama_bench
from tests.backends.models import FULL, MIXED, SHORT
from tests.backends.sshd import KEYGEN, SSHD, Server, make_server
from tests.search.strategies import write_graded

pytestmark = pytest.mark.skipif(
    not (SSHD and KEYGEN and sys.platform == "linux"), reason="needs an OpenSSH server (apt-get install openssh-server)"
)


@pytest.fixture(scope="module")
def _module_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    pytest.importorskip("asyncssh")
    server = make_server(tmp_path_factory.mktemp("sshd"))
    yield server
    server.stop()


@pytest.fixture
def server(_module_server: Server) -> Server:
    if _module_server.process is None or _module_server.process.poll() is not None:
        _module_server.start()
    return _module_server


@pytest.fixture
def target(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Target:
    scratch = tmp_path / "here"
    scratch.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(scratch))
    there = over_ssh(read_target("cpu"), server.host, port=server.port, identity=server.identity)
    options = {**there.options, "known_hosts": str(server.known_hosts), "python": sys.executable}
    return Target(name="cpu", description="", backend="ssh", options=options)


def left_behind(server: Server, tmp_path: Path) -> list[str]:
    for _ in range(12_000):
        found = [*server.temporary.iterdir(), *(tmp_path / "here").iterdir()]
        if not found:
            break
        time.sleep(0.05)
    return [str(path) for path in found]


def test_graphs_are_measured_there_and_nothing_is_left(server: Server, target: Target, tmp_path: Path) -> None:
    results = measure_latency([FULL, MIXED], SHORT, target=target, rounds=2)
    for result in results:
        assert isinstance(result, Latency)
        assert result.source == "measured"
        assert result.decode.p50_ms > 0 and result.prefill.p50_ms > 0
        assert result.device["runtime"].startswith("onnxruntime ")
        assert result.device["host"] == "127.0.0.1"
        assert result.memory_mb
    assert ssh_backend.describe(target)["host"] == "127.0.0.1"
    assert left_behind(server, tmp_path) == []


@pytest.mark.parametrize("runs", ["wheel", "binary"])
def test_llama_cpp_measures_there(runs: str, server: Server, target: Target, tmp_path: Path) -> None:
    """Bare dims: a header goes there, and weights are made there."""
    options: dict[str, object] = {"threads": 1}
    if runs == "wheel":
        pytest.importorskip("xllamacpp")
    else:
        program = tmp_path / "llama-bench"
        program.write_text(f"#!/bin/sh\nexec '{sys.executable}' '{llama_bench.__file__}' \"$@\"\n")
        program.chmod(0o755)
        options["binary"] = str(program)
    there = dataclasses.replace(target, options={**target.options, "backend": "llamacpp", "options": options})
    results = measure_latency([FULL, MIXED], SHORT, target=there, rounds=1)
    for result in results:
        assert isinstance(result, Latency), result
        assert result.device["runtime"].startswith("xllamacpp" if runs == "wheel" else "llama-bench")
        assert result.device["host"] == "127.0.0.1"
    assert left_behind(server, tmp_path) == []


def test_a_server_killed_in_the_middle_is_connected_to_again(
    server: Server, target: Target, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ssh_backend.check(target)
    seen = threading.Event()
    rounds_seen: list[tuple[int, int]] = []
    attempt = ssh_backend._attempt

    async def watched(host: Host, job: Any, events: list[dict[str, Any]], advance: Any) -> None:
        rounds_seen.append((len(events), 0))
        await attempt(host, job, events, lambda steps: seen.set())

    monkeypatch.setattr(ssh_backend, "_attempt", watched)
    results: list[Any] = []
    measuring = threading.Thread(
        target=lambda: results.extend(measure_latency([FULL, MIXED], SHORT, target=target, rounds=3))
    )
    measuring.start()
    assert seen.wait(600)
    assert list(server.temporary.iterdir()), "the runner works in a folder that is removed later"
    server.kill()
    server.start()
    measuring.join(600)
    assert [type(result) for result in results] == [Latency, Latency]
    assert len(rounds_seen) == 2
    assert rounds_seen[1][0] > 0, "the second connection goes on where the first one broke"
    assert left_behind(server, tmp_path) == []


def test_a_server_that_stays_away_is_exit_6(
    server: Server, target: Target, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ssh_backend.check(target)
    server.kill()
    with pytest.raises(
        TargetUnavailable, match=r"The connection to root@127\.0\.0\.1 broke 3 times|broke 3 times"
    ) as caught:
        measure_latency([FULL], SHORT, target=target, rounds=1)
    assert caught.value.exit_code == 6
    assert left_behind(server, tmp_path) == []


def test_an_unknown_host_key_is_refused(server: Server, target: Target, tmp_path: Path) -> None:
    empty = tmp_path / "known_hosts"
    empty.write_text("")
    options = {**target.options, "known_hosts": str(empty)}
    availability = ssh_backend.check(Target(name="cpu", description="", backend="ssh", options=options))
    assert not availability.ok
    assert availability.reason.startswith("The host key of 127.0.0.1 is not trusted")
    assert availability.next_step == "Connect once with 'ssh' and compare the key, or name a file in 'known_hosts'."


def test_a_wrong_user_key_is_refused(server: Server, target: Target, tmp_path: Path) -> None:
    assert KEYGEN
    subprocess.run([KEYGEN, "-q", "-t", "ed25519", "-N", "", "-f", str(tmp_path / "stranger")], check=True)
    options = {**target.options, "identity": str(tmp_path / "stranger")}
    availability = ssh_backend.check(Target(name="cpu", description="", backend="ssh", options=options))
    assert not availability.ok
    assert "does not let us in" in availability.reason


def test_a_runtime_that_is_missing_there_is_named(server: Server, target: Target) -> None:
    options = {**target.options, "options": {"providers": ["CUDAExecutionProvider"]}}
    availability = ssh_backend.check(Target(name="cpu", description="", backend="ssh", options=options))
    assert not availability.ok
    assert "has no CUDAExecutionProvider" in availability.reason


def test_an_interpreter_that_is_missing_there_is_named(server: Server, target: Target) -> None:
    options = {**target.options, "python": "python-of-nowhere"}
    availability = ssh_backend.check(Target(name="cpu", description="", backend="ssh", options=options))
    assert "python-of-nowhere does not start on" in availability.reason


@pytest.mark.parametrize(
    ("program", "said"),
    [
        ("echo Welcome to the board", "Welcome to the board"),
        ("mkdir $TMPDIR/amoeba-1; echo $TMPDIR/amoeba-1; read run; echo '{\"event\": 1}'", '{"event": 1}'),
        ("mkdir $TMPDIR/amoeba-2; echo $TMPDIR/amoeba-2; read run; printf '\\377\\n'", "\ufffd"),
    ],
)
def test_a_device_that_answers_garbage(program: str, said: str, server: Server, target: Target, tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\n{program}\ncat > /dev/null\nrm -rf $TMPDIR/amoeba-*\n")
    python.chmod(0o755)
    with pytest.raises(TargetUnavailable) as caught:
        ssh_backend.describe(dataclasses.replace(target, options={**target.options, "python": str(python)}))
    assert caught.value.exit_code == 6
    assert caught.value.what == f"{server.host} answers what no runner of ours says: {said!r}."
    assert caught.value.next_step is not None
    assert "may print to stdout" in caught.value.next_step
    assert left_behind(server, tmp_path) == []


def test_only_backends_of_the_runner_go_over_ssh() -> None:
    options = {"host": "somewhere", "backend": "analytic"}
    with pytest.raises(InputError, match="'analytic' does not run through the runner"):
        ssh_backend.check(Target(name="x", description="", backend="ssh", options=options))


def test_a_model_is_profiled_exported_and_measured_over_ssh(
    server: Server, target: Target, tiny_dirs: dict[str, Path], tmp_path: Path
) -> None:
    """The whole job with a target file whose device is behind the server."""
    strategy = write_graded(tiny_dirs["llama"], tmp_path / "strategy.safetensors")
    path = tmp_path / "board.toml"
    lines = [f"{key} = {json.dumps(value)}" for key, value in target.options.items() if not isinstance(value, dict)]
    path.write_text(
        "\n".join(['description = "a board"', 'backend = "ssh"', 'formats = ["onnx"]', "[options]", *lines])
    )
    request = ExportRequest(
        model=str(tiny_dirs["llama"]),
        strategy=strategy,
        target=str(path),
        latency="10s",
        prompt_tokens=8,
        generate_tokens=8,
        out=tmp_path / "out",
        require_measured=True,
    )
    manifest = export(request).manifest
    assert manifest is not None
    assert manifest.latency is not None
    assert manifest.latency.source == "measured"
    assert manifest.latency.measured_ms is not None
    assert left_behind(server, tmp_path) == []
