"""What the libraries below us report to their makers is switched off, in this process and in all that it starts."""

from __future__ import annotations

import os

SWITCHES = {
    "ORT_DISABLE_TELEMETRY": "1",  # onnxruntime and onnxruntime-genai: a host is looked up, a device id kept
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "DO_NOT_TRACK": "1",  # whatever else asks
}
"""Environment variables, read when the library is imported or started."""


def switch_off() -> None:
    """Set them, except those that the user has set."""
    for name, value in SWITCHES.items():
        os.environ.setdefault(name, value)
