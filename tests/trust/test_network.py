"""No process of ours opens a connection, looks a name up or reports to the makers of a library."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

from amoeba_export.backends import connection
from amoeba_export.telemetry import SWITCHES
from tests.trust.conftest import Place

GUARD = """
import sys
def hook(event, arguments):
    if event in ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto", "socket.sendmsg"):
        with open({log!r}, "a") as file:
            print(event, arguments[-1], file=file)
sys.addaudithook(hook)
"""
"""As `sitecustomize`, it is in every Python process that inherits PYTHONPATH."""


def clean(*unset: str) -> dict[str, str]:
    """The environment of a user: nothing switched off, the hub not forced offline."""
    return {k: v for k, v in os.environ.items() if k not in (*SWITCHES, "HF_HUB_OFFLINE", *unset)}


def run_traced(words: list[list[object]], folder: Path) -> tuple[str, str]:
    """Run commands in one process of its own. What Python's sockets did, and, where strace works, what any did."""
    (folder / "guard").mkdir()
    log, trace = folder / "sockets.log", folder / "strace.log"
    (folder / "guard" / "sitecustomize.py").write_text(GUARD.format(log=str(log)))
    lines = [[str(word) for word in command] for command in words]
    code = f"from amoeba_export.cli.app import main\nfor words in {lines!r}: assert main(words) == 0, words"
    call = [sys.executable, "-c", code]
    tracer = ["strace", "-f", "--seccomp-bpf", "-qq", "-e", "trace=connect,sendto,sendmsg,sendmmsg", "-o", str(trace)]
    if shutil.which("strace") and subprocess.run([*tracer, "true"], check=False, capture_output=True).returncode == 0:
        call = [*tracer, *call]
    paths = os.pathsep.join([str(folder / "guard"), str(Path(__file__).parents[2])])
    home = {"HOME": str(folder), "XDG_CACHE_HOME": str(folder / "cache"), "AMOEBA_CACHE": str(folder / "amoeba")}
    env = {**clean("PYTHONPATH"), **home, "PYTHONPATH": paths, "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(call, env=env, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, done.stderr
    return tuple(path.read_text() if path.is_file() else "" for path in (log, trace))  # type: ignore[return-value]


def test_export_verify_and_bench_reach_nothing(place: Place, tmp_path: Path) -> None:
    target = tmp_path / "here.toml"
    target.write_text('description = "here"\nbackend = "onnxruntime"\n')
    out = tmp_path / "out"
    formats = ("--format", "safetensors,onnx", "--dtype", "fp32")
    refit = ("--refit", "fast", "--heal", "off")  # it reads the text that a full one and a distillation read, too
    words: list[list[object]] = [
        ["export", place.model, "--strategy", place.strategy, "--shape", "3x0.5", *refit, "--out", out, *formats],
        ["verify", out, "--model", place.model, "--strategy", place.strategy],
        ["bench", out, "--target", target, "--rounds", "1", "--prompt", "4", "--generate", "4"],
    ]
    sockets, trace = run_traced(words, tmp_path)
    assert sockets == ""
    assert [line for line in trace.splitlines() if "AF_INET" in line] == []
    left = [path.name for path in tmp_path.rglob("*") if path.suffix == ".db" or path.name == "deviceid"]
    assert left == [], "onnxruntime kept what it would report"


def test_the_guard_sees_a_connection(tmp_path: Path) -> None:
    """Else the test above would prove nothing."""
    (tmp_path / "sitecustomize.py").write_text(GUARD.format(log=str(tmp_path / "log")))
    code = "import socket; socket.socket(socket.AF_INET, socket.SOCK_DGRAM).connect(('127.0.0.1', 9))"
    subprocess.run([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": str(tmp_path)}, check=True)
    assert (tmp_path / "log").read_text() == "socket.connect ('127.0.0.1', 9)\n"


def test_reports_are_off_as_soon_as_amoeba_is_imported() -> None:
    """In children and workers too, which import it before any runtime."""
    code = "import amoeba_export, json, os, sys; print(json.dumps([dict(os.environ), 'onnxruntime' in sys.modules]))"
    done = subprocess.run([sys.executable, "-c", code], env=clean(), capture_output=True, text=True, check=True)
    environment, is_imported = json.loads(done.stdout)
    assert {name: environment[name] for name in SWITCHES} == SWITCHES
    assert not is_imported


def test_openvino_reports_nothing(tmp_path: Path) -> None:
    """It has no variable: importing it would write an id into the home and send an event."""
    code = """
from amoeba_export.backends.runner import engine_openvino
from amoeba_export.backends.runner.engines import Unavailable
try:
    engine_openvino.describe({"device": "CPU", "threads": 1, "hints": {}})
except (Unavailable, KeyError):
    pass
import sys
assert sys.modules["openvino_telemetry"] is None
"""
    env = {**clean(), "HOME": str(tmp_path)}
    subprocess.run([sys.executable, "-c", code], env=env, check=True)
    assert list(tmp_path.rglob("*")) == []


def test_a_user_may_switch_them_on() -> None:
    code = "import amoeba_export, os; print(os.environ['ORT_DISABLE_TELEMETRY'])"
    env = {**clean(), "ORT_DISABLE_TELEMETRY": "0"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    assert done.stdout == "0\n"


def test_reports_are_off_on_the_device_of_an_ssh_target(tmp_path: Path) -> None:
    """The bootstrap's child gets the variables: there is no amoeba that could set them."""
    process = subprocess.Popen(
        [sys.executable, "-c", connection.BOOTSTRAP],
        env=clean("PYTHONPATH"),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdin and process.stdout
    folder = Path(process.stdout.readline().strip())
    with zipfile.ZipFile(folder / "runner.zip", "w") as archive:
        archive.writestr("amoeba_runner/__init__.py", "")
        archive.writestr(
            "amoeba_runner/__main__.py", "import json, os; print(json.dumps(dict(os.environ)), flush=True)"
        )
    process.stdin.write("run\n")
    process.stdin.flush()
    environment = json.loads(process.stdout.readline())
    process.communicate()
    assert {name: environment[name] for name in SWITCHES} == SWITCHES
    assert not folder.exists()
