"""What a runner on another machine may say, line by line. Whatever else comes is not from our runner."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection
from typing import Any

_FOLDER = re.compile(r"/(?:[^\x00-\x1f]*/)?amoeba-[A-Za-z0-9_-]+")
_TEXTS: dict[str, tuple[str, ...]] = {"unavailable": ("reason", "next_step"), "failure": ("reason",)}


def read_folder(line: str) -> str:
    """The first line: the folder that the bootstrap made. Raises `ValueError` for anything else."""
    folder = line.strip()
    if not _FOLDER.fullmatch(folder):
        raise ValueError(line)
    return folder


def read_event(line: str, *, subjects: Collection[int], rounds: int) -> dict[str, Any]:
    """One event of a job with these subjects and rounds. Raises `ValueError` for anything else."""
    event = json.loads(line)  # a JSONDecodeError is a ValueError
    if not isinstance(event, dict):
        raise ValueError(line)
    kind = event.get("event")
    texts = [event.get(name) for name in _TEXTS.get(str(kind), ())]
    if not all(isinstance(text, str) for text in texts):
        raise ValueError(line)
    if kind in ("result", "failure") and (event.get("id") not in subjects or event.get("round") not in range(rounds)):
        raise ValueError(line)
    fits: dict[str, Callable[[], bool]] = {
        "device": lambda: _is_device(event.get("device")),
        "unavailable": lambda: True,
        "failure": lambda: True,
        "result": lambda: (
            _are_numbers(event.get("decode_ms"))
            and _are_numbers(event.get("prefill_ms"))
            and "memory_mb" in event
            and (event["memory_mb"] is None or _are_numbers([event["memory_mb"]]))
        ),
        "done": lambda: _are_temperatures(event.get("temperature_c")) and _are_devices(event.get("speed")),
    }
    if not isinstance(kind, str) or kind not in fits or not fits[kind]():
        raise ValueError(line)
    return event


def _is_device(value: object) -> bool:
    return isinstance(value, dict) and all(isinstance(one, str) for one in value.values())


def _are_devices(value: object) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(map(_is_device, value))


def _are_numbers(value: object) -> bool:
    return isinstance(value, list) and all(type(one) in (int, float) for one in value)


def _are_temperatures(value: object) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(one is None or _are_numbers([one]) for one in value)
