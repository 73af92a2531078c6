"""llama.cpp, asked about a file from outside: in a process that can be killed.

In our own process its server hangs on the way out of an interrupt, and a file that it cannot take may end the process.
"""

from __future__ import annotations

import importlib.util
import json
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from amoeba_export.errors import DamagedFile

TIME_LIMIT_S = 1800.0
"""For all answers together: generous, because what hangs is stopped by Ctrl-C as well."""


def is_installed() -> bool:
    """Whether there is a llama.cpp to ask. Loads nothing."""
    return importlib.util.find_spec("xllamacpp") is not None


def ask(
    path: Path,
    questions: Sequence[tuple[str, Mapping[str, Any]]],
    *,
    context_tokens: int,
    own_chat_template: bool = False,
    time_limit_s: float = TIME_LIMIT_S,
) -> list[Any]:
    """Open `path` in llama.cpp's server, with a cache in fp32, and return its answer to each question.

    A question is an endpoint of the server (`completion`, `tokenize`) and the JSON that is posted there. The file's own
    chat template is left unread unless it is asked for: none of these needs it.

    Raises:
        DamagedFile: llama.cpp does not open the file, fails at a question, crashes, or takes too long.
    """
    request = {
        "path": str(path),
        "context_tokens": context_tokens,
        "questions": list(questions),
        "own_chat_template": own_chat_template,
    }
    with tempfile.TemporaryFile() as complaints:
        # A session of its own: Ctrl-C on a terminal goes to us alone, and we end it.
        process = subprocess.Popen(
            [sys.executable, "-P", Path(__file__).with_name("child.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=complaints,
            start_new_session=True,
        )
        late = threading.Event()

        def stop() -> None:
            late.set()
            process.kill()

        limit = threading.Timer(time_limit_s, stop)
        limit.daemon = True
        limit.start()
        try:
            reply = _exchange(process, json.dumps(request).encode() + b"\n")
        finally:
            limit.cancel()
            process.kill()
            process.wait()
        if late.is_set():
            raise DamagedFile(path, f"llama.cpp took longer than {time_limit_s:g} s with it")
        failure = _last_words(process.returncode, complaints) if not reply else None
    answer: dict[str, Any] = json.loads(reply) if reply else {"failure": failure}
    if "failure" in answer:
        raise DamagedFile(path, f"llama.cpp cannot use it: {answer['failure']}")
    answers: list[Any] = answer["answers"]
    return answers


def takes_chat_template(path: Path) -> bool:
    """Whether llama.cpp's server starts with the chat template of a file that it opens without one."""
    try:
        ask(path, [], context_tokens=8, own_chat_template=True)
    except DamagedFile:
        return False
    return True


def _exchange(process: subprocess.Popen[bytes], request: bytes) -> bytes:
    """The whole answer, empty when the process dies. stdin is open until then: by its end the child hears of ours."""
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        with process.stdin, process.stdout:
            process.stdin.write(request)
            process.stdin.flush()
            return process.stdout.read()
    except BrokenPipeError:
        return b""


def _last_words(code: int, complaints: IO[bytes]) -> str:
    complaints.seek(0)
    lines = [line.strip() for line in complaints.read().decode(errors="replace").splitlines() if line.strip()]
    how = signal.Signals(-code).name if code < 0 else f"code {code}"
    return f"its process ended with {how}" + (f" ({lines[-1][:300]})" if lines else "")
