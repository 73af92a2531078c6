"""The process that llama.cpp runs in, with a llama.cpp of our own that does what a test wants."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from amoeba_export import llama_cpp
from amoeba_export.errors import DamagedFile

_FAKE = """
import http.server, json, os, threading, time, types
from pathlib import Path

class Free:
    def __getattr__(self, name):
        value = types.SimpleNamespace()
        setattr(self, name, value)
        return value

CommonParams = Free
ggml_type = types.SimpleNamespace(GGML_TYPE_F32=0)
llama_flash_attn_type = types.SimpleNamespace(LLAMA_FLASH_ATTN_TYPE_DISABLED=0)

class Handler(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps({"endpoint": self.path, "body": body}).encode())

    def log_message(self, *words):
        print("noise on stdout")

class Server:
    def __init__(self, settings):
        (Path(__file__).parent / "pid").write_text(str(os.getpid()))
        BEHAVIOUR
        server = http.server.HTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        self.listening_address = f"http://127.0.0.1:{server.server_port}"
"""


@pytest.fixture
def behave(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Make the llama.cpp whose server does this while it opens a file."""
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))

    def make(line: str) -> None:
        (tmp_path / "xllamacpp.py").write_text(_FAKE.replace("BEHAVIOUR", line))

    return make


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_each_question_has_its_answer(behave: Callable[[str], None], tmp_path: Path) -> None:
    behave("print('noise on stdout')")
    questions = [("completion", {"prompt": [1, 2]}), ("tokenize", {"content": "é"})]
    assert llama_cpp.ask(tmp_path / "model.gguf", questions, context_tokens=8) == [
        {"endpoint": "/completion", "body": {"prompt": [1, 2]}},
        {"endpoint": "/tokenize", "body": {"content": "é"}},
    ]
    assert not is_alive(int((tmp_path / "pid").read_text()))


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("raise RuntimeError('no such tensor')", "llama.cpp cannot use it: RuntimeError: no such tensor"),
        ("os.write(2, b'GGML_ASSERT(n > 0)\\n'); os.abort()", "its process ended with SIGABRT (GGML_ASSERT(n > 0))"),
        ("os._exit(7)", "its process ended with code 7"),
    ],
)
def test_a_file_that_it_does_not_take(line: str, reason: str, behave: Callable[[str], None], tmp_path: Path) -> None:
    behave(line)
    with pytest.raises(DamagedFile) as caught:
        llama_cpp.ask(tmp_path / "model.gguf", [], context_tokens=8)
    assert reason in caught.value.what
    assert caught.value.where == str(tmp_path / "model.gguf")


def test_one_that_hangs_is_stopped(behave: Callable[[str], None], tmp_path: Path) -> None:
    behave("threading.Event().wait()")
    with pytest.raises(DamagedFile, match=r"took longer than 0\.01 s"):
        llama_cpp.ask(tmp_path / "model.gguf", [], context_tokens=8, time_limit_s=0.01)


def test_an_interrupt_ends_it(behave: Callable[[str], None], tmp_path: Path) -> None:
    """It interrupts who asked from inside, so that it surely works at that moment, and would go on for ever."""
    behave(f"os.kill({os.getpid()}, {int(signal.SIGUSR1)}); threading.Event().wait()")

    def interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGUSR1, interrupt)
    try:
        with pytest.raises(KeyboardInterrupt):
            llama_cpp.ask(tmp_path / "model.gguf", [], context_tokens=8)
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert not is_alive(int((tmp_path / "pid").read_text()))
