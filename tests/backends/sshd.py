"""A real OpenSSH server on loopback, for one user and one key, that can be killed."""

from __future__ import annotations

import getpass
import os
import shutil
import signal
import socket
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

SSHD = shutil.which("sshd", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/local/sbin")
KEYGEN = shutil.which("ssh-keygen")


@dataclass
class Server:
    """The server; `temporary` is where programs over there put temporary files."""

    folder: Path
    port: int
    temporary: Path
    process: subprocess.Popen[bytes] | None = None

    @property
    def host(self) -> str:
        return f"{getpass.getuser()}@127.0.0.1"

    @property
    def identity(self) -> Path:
        return self.folder / "user_key"

    @property
    def known_hosts(self) -> Path:
        return self.folder / "known_hosts"

    def start(self) -> None:
        assert SSHD
        self.process = subprocess.Popen([SSHD, "-D", "-e", "-f", str(self.folder / "config")], stderr=subprocess.PIPE)
        for _ in range(12_000):
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", self.port)) == 0:
                    return
            time.sleep(0.05)
        self.process.kill()
        assert self.process.stderr
        raise AssertionError(self.process.stderr.read().decode())

    def kill(self) -> None:
        """Kill the server and every connection of it, as a power cut of the network would."""
        assert self.process
        for pid in [*_descendants(self.process.pid, "sshd"), self.process.pid]:
            os.kill(pid, signal.SIGKILL)
        self.process.wait()
        assert self.process.stderr
        self.process.stderr.close()

    def stop(self) -> None:
        if self.process and self.process.poll() is None:
            self.kill()


def make_server(folder: Path) -> Server:
    """Keys, settings and a free port; not started."""
    assert KEYGEN
    for name in ("host_key", "user_key"):
        subprocess.run([KEYGEN, "-q", "-t", "ed25519", "-N", "", "-f", str(folder / name)], check=True)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    temporary = folder / "tmp"
    temporary.mkdir()
    Path("/run/sshd").mkdir(exist_ok=True) if os.getuid() == 0 else None
    (folder / "authorized_keys").write_text((folder / "user_key.pub").read_text())
    (folder / "known_hosts").write_text(f"[127.0.0.1]:{port} {(folder / 'host_key.pub').read_text()}")
    (folder / "config").write_text(
        f"""
Port {port}
ListenAddress 127.0.0.1
HostKey {folder / "host_key"}
AuthorizedKeysFile {folder / "authorized_keys"}
PidFile none
UsePAM no
StrictModes no
PasswordAuthentication no
PermitRootLogin prohibit-password
Subsystem sftp internal-sftp
SetEnv TMPDIR={temporary}
"""
    )
    return Server(folder=folder, port=port, temporary=temporary)


def _descendants(pid: int, name: str) -> list[int]:
    """Processes called `name` below `pid`."""
    found = []
    for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
        if Path(f"/proc/{child}/comm").read_text().strip().startswith(name):
            found += [*_descendants(int(child), name), int(child)]
    return found
