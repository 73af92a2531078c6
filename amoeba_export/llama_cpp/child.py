"""The program that `llama_cpp.ask` runs: opens one GGUF file in llama.cpp's server, answers, ends.

It is run by its path and imports nothing of amoeba: it starts as fast as xllamacpp does.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
import threading
import urllib.request
from typing import Any

_OPEN: list[Any] = []
"""Servers stay until the process ends: one that is torn down just after its start waits for ever."""


def main() -> None:
    """Read one request from stdin, and write `{"answers": [...]}` or `{"failure": why}` to what was stdout."""
    reply = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # llama.cpp prints there
    _end_with_parent()
    request = json.loads(sys.stdin.readline())
    threading.Thread(target=_wait_for_the_end_of_stdin, daemon=True).start()
    try:
        answer: dict[str, Any] = {"answers": _answers(**request)}
    except Exception as error:  # whatever llama.cpp says of the file is the answer
        answer = {"failure": f"{type(error).__name__}: {error}"}
    reply.write(json.dumps(answer))
    reply.flush()
    os._exit(0)  # tearing the server down may hang


def _answers(
    path: str, context_tokens: int, questions: list[tuple[str, dict[str, Any]]], own_chat_template: bool
) -> list[Any]:
    import xllamacpp

    settings = xllamacpp.CommonParams()
    settings.model.path = path
    settings.n_ctx = context_tokens
    settings.n_parallel = 1
    settings.warmup = False
    settings.verbosity = -1
    # Nothing here is a chat: one that llama.cpp cannot parse must not keep it from opening the file.
    if not own_chat_template:
        settings.chat_template = "chatml"
    settings.cache_type_k = settings.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    settings.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    server = xllamacpp.Server(settings)  # on a free port of the loopback device
    _OPEN.append(server)
    # Its Python calls answer with text, from which tokens that are no whole character are missing.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    answers = []
    for endpoint, body in questions:
        request = urllib.request.Request(
            f"{server.listening_address}/{endpoint}", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with opener.open(request) as response:
            answers.append(json.load(response))
    return answers


def _end_with_parent() -> None:
    """Linux kills this process with its parent, even while native code holds the interpreter's lock."""
    if sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)


def _wait_for_the_end_of_stdin() -> None:
    sys.stdin.read()
    os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    main()
