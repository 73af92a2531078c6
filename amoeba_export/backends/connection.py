"""An SSH connection to another machine, and what waits there for the word to start.

A bootstrap makes a temporary folder, holds it as long as the connection lives, and removes it with everything in it
when the connection ends, however it ends.
"""

from __future__ import annotations

import asyncio
import shlex
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from amoeba_export.backends.targets import Strict
from amoeba_export.errors import TargetUnavailable
from amoeba_export.telemetry import SWITCHES

BOOTSTRAP = """
import os, shutil, signal, subprocess, sys, tempfile
signal.signal(signal.SIGHUP, signal.SIG_IGN)
folder = tempfile.mkdtemp(prefix="amoeba-")
runner = None
try:
    print(folder, flush=True)
    for line in sys.stdin:
        environment = {**SWITCHES, **os.environ, "PYTHONPATH": os.path.join(folder, "runner.zip"), "TMPDIR": folder}
        job = os.path.join(folder, "job.json")
        command = [sys.executable, "-m", "amoeba_runner", "--job", job]
        runner = subprocess.Popen(command, env=environment, stdin=subprocess.PIPE)
finally:
    if runner is not None:
        runner.kill()
        runner.wait()
    shutil.rmtree(folder, ignore_errors=True)
""".replace("SWITCHES", repr(SWITCHES))
"""Runs on the device: each line on stdin starts the job, the end of stdin ends everything."""


class Dropped(Exception):
    """The connection ended before the job did."""


class Host(Strict):
    """A machine, and how to get in.

    Attributes:
        host: `user@host`, or a name from `~/.ssh/config`.
        port: Port, or None for SSH's own choice.
        identity: Private key, or None for the agent and the default keys.
        known_hosts: Host keys that are trusted, or None for `~/.ssh/known_hosts`.
        python: The interpreter there; it needs numpy and the runtime.
    """

    host: Annotated[str, Field(min_length=1)]
    port: Annotated[int, Field(ge=1, le=65535)] | None = None
    identity: Path | None = None
    known_hosts: Path | None = None
    python: str = "python3"


@asynccontextmanager
async def connected(to: Host) -> AsyncIterator[tuple[Any, Any]]:
    """A connection and the bootstrap running on it. Host keys are checked; there is no way to skip that."""
    try:
        import asyncssh
    except ImportError as error:
        raise TargetUnavailable(
            "measuring over SSH needs asyncssh", "Install it: pip install 'amoeba-export[ssh]'."
        ) from error
    user, _, host = to.host.rpartition("@")
    settings: dict[str, Any] = {"keepalive_interval": 10, "login_timeout": 30}
    if user:
        settings["username"] = user
    if to.port is not None:
        settings["port"] = to.port
    if to.identity is not None:
        settings["client_keys"] = [str(to.identity.expanduser())]
    if to.known_hosts is not None:
        settings["known_hosts"] = str(to.known_hosts.expanduser())
    try:
        connection = await asyncssh.connect(host, **settings)
    except asyncssh.HostKeyNotVerifiable as error:
        raise TargetUnavailable(
            f"the host key of {host} is not trusted ({error})",
            "Connect once with 'ssh' and compare the key, or name a file in 'known_hosts'.",
        ) from error
    except asyncssh.PermissionDenied as error:
        raise TargetUnavailable(
            f"{to.host} does not let us in ({error})", "Give the right user and --identity, or start an SSH agent."
        ) from error
    except (asyncssh.KeyImportError, FileNotFoundError) as error:
        raise TargetUnavailable(f"the identity cannot be used ({error})", "Give the path of a private key.") from error
    except OSError as error:
        raise Dropped(f"{host} cannot be reached: {error}") from error
    async with connection:
        command = f"exec {shlex.quote(to.python)} -c {shlex.quote(BOOTSTRAP)}"
        process = await connection.create_process(command, errors="replace")
        try:
            yield connection, process
        finally:
            # The end of stdin makes the bootstrap clean up; its exit says that it has.
            if not process.is_closing():
                process.stdin.write_eof()
                try:
                    await asyncio.wait_for(process.wait_closed(), 10)
                except TimeoutError:
                    process.kill()
