"""The list of engines: how each runtime opens a model and takes one step."""

from __future__ import annotations

import importlib
from typing import Any

ENGINES = {
    "onnxruntime": ".engine_onnxruntime",
}
"""Engine name, and its module here. A name with a dot is a module of somebody else's."""


def load_engine(name: str) -> Any:
    """The engine module called `name`.

    An engine has `describe(options) -> dict` (versions and what it runs on; raises `Unavailable`) and
    `open_model(subject, workload, options)`, which gives an object with `prefill()`, `decode()` and `close()`.
    A step returns when its work is done, and `decode` always runs at the workload's KV length.
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
