"""A device that answers garbage, with a connection that is not one: runs where there is no SSH server."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import Any

import pytest

from amoeba_export.backends import ssh as ssh_backend
from amoeba_export.backends.connection import Host
from amoeba_export.errors import TargetUnavailable
from amoeba_export.ir import Target

pytest.importorskip("asyncssh")

FOLDER = "/tmp/amoeba-1\n"


class Sftp:
    async def __aenter__(self) -> Sftp:
        return self

    async def __aexit__(self, *_: object) -> None: ...

    async def put(self, *_: object, **__: object) -> None: ...

    @asynccontextmanager
    async def open(self, *_: object) -> AsyncIterator[Any]:
        async def write(content: bytes) -> None: ...

        yield SimpleNamespace(write=write)


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        (["Welcome to the board\n"], "Welcome to the board"),
        ([FOLDER, "Segmentation fault\n"], "Segmentation fault"),
        ([FOLDER, '{"event": "result", "id": 5}\n'], '{"event": "result", "id": 5}'),
        ([FOLDER, "\ufffd\x1b[31m" + "x" * 500 + "\n"], "\ufffd\x1b[31m" + "x" * 74),
    ],
)
def test_a_device_that_answers_garbage(lines: list[str], said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    left = list(lines)

    async def readline() -> str:
        return left.pop(0) if left else ""

    @asynccontextmanager
    async def connected(to: Host) -> AsyncIterator[tuple[Any, Any]]:
        stdin = SimpleNamespace(write=lambda text: None)
        yield (
            SimpleNamespace(start_sftp_client=Sftp),
            SimpleNamespace(stdout=SimpleNamespace(readline=readline), stdin=stdin),
        )

    monkeypatch.setattr(ssh_backend, "connected", connected)
    options = {"host": f"me@board-{len(said)}", "backend": "onnxruntime"}
    with pytest.raises(TargetUnavailable) as caught:
        ssh_backend.describe(Target(name="board", description="", backend="ssh", options=options))
    assert caught.value.exit_code == 6
    assert caught.value.what == f"me@board-{len(said)} answers what no runner of ours says: {said!r}."
    assert caught.value.next_step == (
        "Nothing over there may print to stdout: look at what 'python3' and the shell print when they start."
    )
