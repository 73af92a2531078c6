"""Timing one step again and again: warm-up, then samples until there are enough or the time is up."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any


def sample_ms(step: Callable[[], Any], *, warm_up: int, seconds: float, least: int, most: int) -> list[float]:
    """Milliseconds of single calls of `step`, in order.

    Stops after `most` samples, or once `least` samples are taken and `seconds` have passed. The `warm_up` calls before
    are not counted: they fault in weights, fill caches and raise clocks.
    """
    for _ in range(warm_up):
        step()
    samples: list[float] = []
    end = time.perf_counter() + seconds
    while len(samples) < most and (len(samples) < least or time.perf_counter() < end):
        start = time.perf_counter_ns()
        step()
        samples.append((time.perf_counter_ns() - start) / 1e6)
    return samples
