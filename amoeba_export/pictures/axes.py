"""Axes of the pictures on pages: round ticks, and a scale from values to pixels."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

_MANTISSAS = ((1,), (1, 3), (1, 2, 5), (1, 1.5, 2, 3, 5, 7), (1, 1.2, 1.4, 1.6, 1.8, 2, 2.5, 3, 3.5, 4, 5, 6, 7, 8, 9))
"""Of the ticks of a logarithmic axis, coarser to finer."""

ROOM = 0.07
"""Of the span of a linear axis, on both sides: a mark on the edge is cut."""

Scale = Callable[[float], float]
"""From a value to its pixel."""


@dataclass(frozen=True, slots=True)
class Tick:
    """A labelled position on an axis."""

    at: float
    label: str


def linear_axis(values: Iterable[float], start: float, stop: float) -> tuple[tuple[Tick, ...], Scale]:
    """About four round ticks, and a scale a little wider than `values`."""
    listed = list(values)
    low, high = min(listed), max(listed)
    span = (high - low) or abs(high) or 1.0
    raw = span / 4
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= raw * 0.999)
    room = ROOM * span
    scale = _scale(low - room, high + room, start, stop)
    first, last = math.ceil((low - room) / step), math.floor((high + room) / step)
    return tuple(Tick(scale(k * step), f"{k * step:.4g}") for k in range(first, last + 1)), scale


def ratio_axis(values: Iterable[float], start: float, stop: float) -> tuple[tuple[Tick, ...], Scale]:
    """A logarithmic axis a little wider than `values`, which are positive: equal factors are equally far apart."""
    listed = list(values)
    low, high = min(listed) / 1.06, max(listed) * 1.06
    line = _scale(math.log(low), math.log(high), start, stop)
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    ticks: list[float] = []
    for mantissas in _MANTISSAS:
        every = (mantissa * 10.0**power for power in decades for mantissa in mantissas)
        ticks = [tick for tick in every if low <= tick <= high]
        if len(ticks) >= 4:
            break
    return tuple(Tick(line(math.log(tick)), f"{tick:.4g}") for tick in ticks), lambda value: line(math.log(value))


def _scale(low: float, high: float, start: float, stop: float) -> Scale:
    """A straight line."""
    step = (stop - start) / (high - low)
    return lambda value: start + (value - low) * step
