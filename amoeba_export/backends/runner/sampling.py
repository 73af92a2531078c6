"""Timing one step again and again: warm-up, then samples until there are enough or the time is up."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any


def sample_ms(
    step: Callable[[], Any],
    *,
    before: Callable[[], Any] | None = None,
    warm_up: int,
    seconds: float,
    least: int,
    most: int,
) -> list[float]:
    """Milliseconds of single calls of `step`, in order.

    Stops after `most` samples, or once `least` samples are taken and `seconds` have passed. The `warm_up` calls before
    are not counted: they fault in weights, fill caches and raise clocks. `before` runs untimed ahead of each call. A
    runtime that times its own steps returns milliseconds from `step`, and those count.
    """
    for _ in range(warm_up):
        if before:
            before()
        step()
    samples: list[float] = []
    end = time.perf_counter() + seconds
    while len(samples) < most and (len(samples) < least or time.perf_counter() < end):
        if before:
            before()
        start = time.perf_counter_ns()
        told_ms = step()
        samples.append((time.perf_counter_ns() - start) / 1e6 if told_ms is None else told_ms)
    return samples
