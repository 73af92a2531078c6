"""How long work takes, from how long it took the last time: kept in the cache, for each kind of work and its steps."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise

from amoeba_export.cache import Cache
from amoeba_export.cache.kinds import PACES
from amoeba_export.errors import AmoebaError

FILE_NAME = "pace.json"
PARTS = 20
"""Of the steps: when each was done is kept."""

SURE_SHARE = 0.3
"""Once so much is done, this run tells more about itself than the last one did."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pace:
    """One run of some work.

    Attributes:
        seconds: All of it.
        marks: Share of that time when each twentieth of the steps was done: rises from 0 to 1. First steps that take
            longer than the others do not foretell hours.
    """

    seconds: float
    marks: tuple[float, ...]

    def share(self, done: float) -> float:
        """The share of the time that the share `done` of the steps took."""
        position = min(max(done, 0.0), 1.0) * (len(self.marks) - 1)
        low = min(int(position), len(self.marks) - 2)
        return self.marks[low] + (position - low) * (self.marks[low + 1] - self.marks[low])


def seconds_left(done: int, total: int, elapsed: float, last: Pace | None) -> float | None:
    """What is left of work of which `done` of `total` steps took `elapsed` seconds; None where nothing tells.

    With a last run, its course is taken: at first its length too, and more and more what this run shows.
    """
    share = done / total
    if last is None:
        return elapsed / share * (1 - share) if done else None
    if not done:
        return max(0.0, last.seconds - elapsed)
    passed = last.share(share)
    if not passed:
        return elapsed / share * (1 - share)
    weight = min(1.0, share / SURE_SHARE)
    return (1 - passed) * (weight * elapsed / passed + (1 - weight) * last.seconds)


def last_pace(description: str, total: int) -> Pace | None:
    """Of the last run of this work with as many steps on this machine; None where there was none."""
    with suppress(AmoebaError, OSError, ValueError, KeyError, TypeError):
        data = Cache().get_json(PACES, _facts(description, total), FILE_NAME)
        if data is not None:
            marks = tuple(float(mark) for mark in data["marks"])
            rises = all(0 <= low <= high <= 1 for low, high in pairwise(marks))
            if rises and len(marks) == PARTS + 1 and 0 < data["seconds"] < float("inf"):
                return Pace(seconds=float(data["seconds"]), marks=marks)
    return None


def keep_pace(description: str, total: int, events: Sequence[tuple[int, float]]) -> None:
    """Remember a run that ended well, if the cache can be written.

    Args:
        description: The work's.
        total: Its steps.
        events: (steps done, seconds since the beginning), in order; the last one is the end.
    """
    seconds = events[-1][1]
    if seconds <= 0:
        return
    inner = [_when(part * total / PARTS, events) / seconds for part in range(1, PARTS)]
    marks = [0.0, *(min(1.0, mark) for mark in inner), 1.0]
    content = {"seconds": round(seconds, 3), "marks": [round(mark, 4) for mark in marks]}
    with suppress(AmoebaError, OSError):
        Cache().put_json(PACES, _facts(description, total), FILE_NAME, content, again=True)


def _when(steps: float, events: Sequence[tuple[int, float]]) -> float:
    """Seconds until so many steps were done, evenly between events."""
    before, start = 0, 0.0
    for done, at in events:
        if done >= steps:
            return start + (steps - before) / (done - before) * (at - start) if done > before else at
        before, start = done, at
    return events[-1][1]


def _facts(description: str, total: int) -> dict[str, object]:
    return {"work": description, "steps": total}
