"""What holds for every test: no network, one thread, a cache and temporary files that are thrown away."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")

import socket
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from amoeba_export.cli.app import main
from tests.tiny import FAMILIES, save_tiny

_LOOPBACK = ("127.0.0.1", "localhost", "::1", "0.0.0.0", None, "")


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """A test that leaves this machine fails; loopback servers of a test's own are fine."""
    connect = socket.socket.connect

    def guarded(self: socket.socket, address: object) -> None:
        if isinstance(address, tuple) and address[0] not in _LOOPBACK and not str(address[0]).startswith("127."):
            raise AssertionError(f"a test tried to reach {address}")
        connect(self, address)  # type: ignore[arg-type]

    monkeypatch.setattr(socket.socket, "connect", guarded)


@pytest.fixture(autouse=True, scope="session")
def _own_temporary_files(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Of tests and of the processes that they start: what a process leaves that a test kills goes with pytest's own."""
    folder = str(tmp_path_factory.mktemp("tmp"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TMPDIR", folder)
        patch.setattr(tempfile, "tempdir", folder)
        yield


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AMOEBA_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture(autouse=True, scope="session")
def _no_refit() -> Iterator[None]:
    """Cuts keep their weights unless a test asks for a refit: most are about something else.

    A process that a test starts knows nothing of it and has to be told.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("amoeba_export.application.resolve.DEFAULT_REFIT", "off")
        yield


@pytest.fixture(scope="session")
def tiny_dirs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One saved tiny model per family. Read-only: copy before you damage one."""
    root = tmp_path_factory.mktemp("models")
    return {family: save_tiny(root / family, family) for family in FAMILIES}


@pytest.fixture
def goldens() -> Path:
    """Arrays recorded from the published AmoebaLLM code; see README.md there."""
    return Path(__file__).parent / "goldens"


@dataclass(frozen=True)
class Run:
    code: int
    out: str
    err: str


@pytest.fixture
def amoeba(capsys: pytest.CaptureFixture[str]) -> Callable[..., Run]:
    """Run one command through `main`, as the console script does."""

    def run(*words: object) -> Run:
        capsys.readouterr()
        code = main([str(word) for word in words])
        captured = capsys.readouterr()
        return Run(code, captured.out, captured.err)

    return run
