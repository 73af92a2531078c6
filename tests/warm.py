"""The command `amoeba` for scripts that call it many times: each call is a fork of a process that imported all.

The command runs as in a process of its own, with the caller's folder, environment, arguments and streams. Only its
imports are those of the parent. Nothing was computed there: a fork has only the thread that made it.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import select
import socket
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]

_CALLER = """\
#!{python} -IS
import json, os, socket, sys

with socket.socket(socket.AF_UNIX) as parent:
    parent.connect({address!r})
    call = json.dumps([sys.argv[1:], os.getcwd(), dict(os.environ)]).encode()
    socket.send_fds(parent, [len(call).to_bytes(4, "big")], [0, 1, 2])
    parent.sendall(call)
    code = parent.recv(4)
sys.exit(int.from_bytes(code, "big") if code else 70)  # it died without saying why
"""


@contextlib.contextmanager
def warm_command(folder: Path, entry: str = "amoeba_export.cli.entry:entry") -> Iterator[None]:
    """Put `amoeba` into `folder`. It works as long as this lasts.

    Args:
        folder: Where the command is put.
        entry: The module and function of the command, as a package names that of a console script.
    """
    with tempfile.TemporaryDirectory(prefix="warm-") as place:  # a path of a socket is short
        address = str(Path(place) / "calls")
        parent = subprocess.Popen(
            [sys.executable, "-m", "tests.warm", address, entry],
            cwd=ROOT,
            env=os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        with parent:
            assert parent.stdout is not None
            assert parent.stdin is not None
            assert parent.stdout.readline() == b"ready\n"
            command = folder / "amoeba"
            command.write_text(_CALLER.format(python=sys.executable, address=address))
            command.chmod(0o755)
            yield
            parent.stdin.close()


def _serve(address: str, entry: str) -> None:
    """Answer calls until stdin ends."""
    import matplotlib.pyplot
    import onnx
    import onnxruntime
    import peft
    import transformers
    from transformers.models.llama import modeling_llama

    import amoeba_export.api
    import amoeba_export.cli.app

    del matplotlib, onnx, onnxruntime, peft, transformers, modeling_llama, amoeba_export
    module, _, name = entry.partition(":")
    command = getattr(importlib.import_module(module), name)
    with socket.socket(socket.AF_UNIX) as calls:
        calls.bind(address)
        calls.listen()
        print("ready", flush=True)
        while sys.stdin not in select.select([sys.stdin, calls], [], [])[0]:
            call, _ = calls.accept()
            if os.fork() == 0:
                calls.close()
                _answer(call, command)
            call.close()
            with contextlib.suppress(ChildProcessError):
                while os.waitpid(-1, os.WNOHANG)[0]:
                    pass
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, 0):
            pass


def _answer(call: socket.socket, command: Callable[[], object]) -> None:
    size, streams, _, _ = socket.recv_fds(call, 4, 3)
    said = b""
    while len(said) < int.from_bytes(size, "big"):
        said += call.recv(1 << 16)
    words, folder, environment = json.loads(said)
    for own, stream in enumerate(streams):
        os.dup2(stream, own)
        os.close(stream)
    sys.stdin, sys.stdout, sys.stderr = (open(number, mode, closefd=False) for number, mode in enumerate("rww"))  # noqa: SIM115 - they end with the process
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    sys.argv = ["amoeba", *words]
    code = 1
    try:
        command()
        code = 0
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        call.sendall(code.to_bytes(4, "big"))
        os._exit(code)


if __name__ == "__main__":
    _serve(*sys.argv[1:])
