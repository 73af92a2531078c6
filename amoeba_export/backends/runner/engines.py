"""The list of engines: how each runtime opens a model and takes one step."""

from __future__ import annotations

import importlib
from typing import Any

ENGINES = {
    "onnxruntime": ".engine_onnxruntime",
    "genai": ".engine_genai",
    "openvino": ".engine_openvino",
    "torch": ".engine_torch",
    "llamacpp": ".engine_llamacpp",
}
"""Engine name, and its module here. A name with a dot is a module of somebody else's."""


def load_engine(name: str) -> Any:
    """The engine module called `name`.

    An engine has `describe(options) -> dict` (versions and what it runs on; raises `Unavailable`) and
    `open_model(subject, workload, options)`, which gives an object with `prefill()`, `decode()` and `close()`.
    A model that works in a process of its own says what that took: `peak_memory_mb()`.
    With `in_main_memory(options)`, it can say that a model takes no other memory than what the system counts: then
    several are opened at once, each in a process of its own, as many as there is room for.
    A step returns when its work is done, None or the milliseconds it took by the runtime's own clock. `decode` always
    runs at the workload's KV length; a model whose cache grows has `rewind()`, called untimed before each decode.
    """
    if "." in name:
        return importlib.import_module(name)
    return importlib.import_module(ENGINES[name], __package__)


class Unavailable(Exception):
    """An engine that cannot work here.

    Args:
        reason: What is missing.
        next_step: What to do about it.
    """

    def __init__(self, reason: str, next_step: str) -> None:
        super().__init__(reason)
        self.next_step = next_step


def advice_for(reason: str) -> str | None:
    """What to do about a runtime's complaint that is known; None for another one."""
    if any(words in reason for words in ("no kernel image is available", "cudaErrorNoKernelImageForDevice")):
        return (
            "The runtime was built for other GPUs than this one: build it for the architecture of the device (87 is "
            "Orin, 110 Thor, 89 an RTX 4090), or install the wheel that its vendor has for the device."
        )
    return None
