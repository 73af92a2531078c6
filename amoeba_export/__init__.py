"""Amoeba: cut one LLM into dense subnets that fit a device. `application.pipeline.export` is the whole story.

    from amoeba_export import ExportRequest, export
    export(ExportRequest(model="demo", target="cpu", latency="75%"))

Names are imported at their first use, so that importing this package imports no torch.
"""

from __future__ import annotations

import importlib
import os
from typing import TYPE_CHECKING, Any

from amoeba_export.first_calls import call_once_torch_is_here
from amoeba_export.telemetry import switch_off
from amoeba_export.version import __version__

if os.name != "posix":
    raise ImportError("amoeba runs on Linux and macOS. On Windows, use it in WSL.")

switch_off()  # here, because it must come before the first import of onnxruntime, in children and workers too
call_once_torch_is_here()

if TYPE_CHECKING:
    from amoeba_export.application.pipeline import ExportResult, export
    from amoeba_export.application.request import ExportRequest
    from amoeba_export.load import load_supernet

_HOMES = {
    "ExportRequest": "amoeba_export.application.request",
    "ExportResult": "amoeba_export.application.pipeline",
    "export": "amoeba_export.application.pipeline",
    "load_supernet": "amoeba_export.load",
}

__all__ = ["ExportRequest", "ExportResult", "__version__", "export", "load_supernet"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value
