"""Where a figure is in what a command printed, and how it becomes milliseconds."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable
from itertools import islice
from typing import Any, Literal

from pydantic import field_validator, model_validator

from amoeba_export.backends.command.template import Template, Words
from amoeba_export.backends.targets import Strict
from amoeba_export.errors import nearest
from amoeba_export.reading.bounds import MAX_FLOAT, shown
from amoeba_export.reading.json_object import parse_json_object
from amoeba_export.reading.patterns import read_pattern

Unit = Literal["us", "ms", "s", "tok/s"]

SPELLINGS: dict[str, Unit] = {
    **dict.fromkeys(("us", "µs", "usec", "microseconds"), "us"),
    **dict.fromkeys(("ms", "msec", "milliseconds"), "ms"),
    **dict.fromkeys(("s", "sec", "secs", "second", "seconds"), "s"),
    **dict.fromkeys(("tok/s", "t/s", "tps", "tokens/s", "tok/sec", "tokens/sec", "tokens/second"), "tok/s"),
}
"""How programs spell units; upper and lower case are the same."""

MOST_LINE = 500
"""Characters of a line that a regular expression is tried on: common patterns take the third power of it."""

MOST_TEXT = 2**20
"""Characters, from the end, that it is tried on."""

MOST_MATCHING_S = 10.0

_NUMBER = re.compile(r"[+-]?(?:(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][+-]?[0-9]{1,3})?")
_STEP = re.compile(r"""\[(-?[0-9]{1,9}|\*)\]|\["([^"]+)"\]|(?:^|\.)([^.\[\]"]+)""")


class NoFigure(Exception):
    """What was printed has no such figure: why, in words."""


class Figure(Strict):
    """Where a figure is. Of several numbers, all are samples unless `take` says otherwise.

    Attributes:
        json_path: Keys and positions in JSON, such as `results[0].samples_ms` or `[*].avg_ts`.
        regex: A Python regular expression, tried on every line; its group `value`, or its first one, is the number. A
            group `unit` is what the program says the unit is, and has to be `unit` where both are given.
        unit: `ms`, `s`, `us`, or `tok/s`: tokens of all sequences together.
        run: The command that prints it, where that is not the target's `run`.
        stream: What it is printed to.
        file: The file that it is written to instead, such as `{out}/result.json`.
        take: Which of several numbers.
    """

    json_path: str | None = None
    regex: str | None = None
    unit: Unit | None = None
    run: Words | None = None
    stream: Literal["stdout", "stderr"] = "stdout"
    file: Template | None = None
    take: Literal["all", "first", "last"] = "all"

    @field_validator("regex")
    @classmethod
    def _compiles(cls, text: str | None) -> str | None:
        if text is not None and not read_pattern(text).groups:
            raise ValueError("it has no group around the number: put it in parentheses")
        return text

    @field_validator("json_path")
    @classmethod
    def _parses(cls, text: str | None) -> str | None:
        if text is not None:
            _steps(text)
        return text

    @model_validator(mode="after")
    def _is_whole(self) -> Figure:
        if (self.json_path is None) == (self.regex is None):
            raise ValueError("give either json_path or regex")
        if self.unit is None and not (self.regex and "unit" in re.compile(self.regex).groupindex):
            raise ValueError("it needs a unit: us, ms, s or tok/s, or a group (?P<unit>...) in the regular expression")
        return self

    def samples_ms(self, text: str, *, tokens: int) -> list[float]:
        """Every sample in `text`, in milliseconds.

        Args:
            text: What the command printed.
            tokens: How many are computed in the time that is looked for: turns tok/s into it.

        Raises:
            NoFigure: There is none, or one that cannot be.
        """
        found = self._in_json(text) if self.json_path is not None else self._in_lines(text)
        taken = {"all": found, "first": found[:1], "last": found[-1:]}[self.take]
        return [_in_ms(value, unit, tokens) for value, unit in taken]

    def _in_json(self, text: str) -> list[tuple[float, Unit]]:
        assert self.json_path is not None and self.unit is not None
        values = [parse_json(text)]
        place = ""
        for name, step in _steps(self.json_path):
            values = [below for value in values for below in step(value, place or "the JSON")]
            place += name
        values = [number for value in values for number in (value if isinstance(value, list) else [value])]
        if not values:
            raise NoFigure(f"{self.json_path} is an empty list")
        for value in values:
            if type(value) not in (int, float):
                raise NoFigure(f"{self.json_path} is {shown(value)}, not a number")
        return [(float(value), self.unit) for value in values]

    def _in_lines(self, text: str) -> list[tuple[float, Unit]]:
        assert self.regex is not None
        pattern = re.compile(self.regex)
        group: int | str = "value" if "value" in pattern.groupindex else 1
        found: list[re.Match[str]] = []
        deadline = time.monotonic() + MOST_MATCHING_S
        for line in text[-MOST_TEXT:].splitlines():
            found += pattern.finditer(line[:MOST_LINE])
            if time.monotonic() > deadline:
                raise NoFigure(f"{self.regex!r} takes longer than {MOST_MATCHING_S:g} s on it")
        if not found:
            raise NoFigure(f"no line has {self.regex!r}")
        return [(_number(match[group]), self._unit_of(match)) for match in found]

    def _unit_of(self, match: re.Match[str]) -> Unit:
        if "unit" not in match.re.groupindex:
            assert self.unit is not None
            return self.unit
        said = (match["unit"] or "").strip()
        unit = SPELLINGS.get(said.lower())
        if unit is None:
            raise NoFigure(f"its unit is {said!r}, which is none of us, ms, s and tok/s")
        if self.unit not in (None, unit):
            raise NoFigure(f"it is in {said}, and the target says {self.unit}")
        return unit


def parse_json(text: str) -> Any:
    """The JSON in `text`: all of it, or else the last line that is a table or a list, as below a log."""
    candidates = [text, *(line for line in reversed(text.splitlines()) if line.lstrip()[:1] in ("{", "["))]
    problem = ""
    for candidate in candidates[:20]:
        try:
            wrapped = parse_json_object('{"": ' + candidate + "}")  # bounded, and also for lists
            if wrapped.keys() == {""}:
                return wrapped[""]
            problem = problem or "it is not JSON"
        except ValueError as error:
            problem = problem or str(error)
    raise NoFigure("it is not JSON, nor is a line of it" if "is not JSON" in problem else problem)


def _number(text: str | None) -> float:
    if not text or not _NUMBER.fullmatch(text):
        raise NoFigure(f"{shown(text)} is not a number")
    return float(text.replace(",", ""))


def _in_ms(value: float, unit: Unit, tokens: int) -> float:
    if not (math.isfinite(value) and 0 < value < MAX_FLOAT):
        raise NoFigure(f"it is {value:g} {unit}, which cannot be")
    if unit == "tok/s":
        return 1000 * tokens / value
    return value * {"us": 1e-3, "ms": 1.0, "s": 1e3}[unit]


_Step = Callable[[Any, str], list[Any]]


def _steps(path: str) -> list[tuple[str, _Step]]:
    """A path as its steps: each its text, and what finds the values below one. Raises `ValueError`."""
    rest = path.removeprefix("$")
    steps: list[tuple[str, _Step]] = []
    position = 0
    while position < len(rest):
        found = _STEP.match(rest, position)
        if found is None:
            raise ValueError(
                f"'{path}' is no path: write keys with dots and positions in brackets, such as results[0].avg_ms"
            )
        position = found.end()
        index, quoted, key = found.groups()
        steps.append((found[0], _item(index) if index else _member(quoted or key)))
    if not steps:
        raise ValueError("it is empty")
    return steps


def _member(key: str) -> _Step:
    def step(value: Any, place: str) -> list[Any]:
        if not isinstance(value, dict):
            raise NoFigure(f"{place} is {shown(value)}, which has no key '{key}'")
        if key not in value:
            known = sorted(other for other in islice(value, 200) if len(other) <= 40)  # a stranger may have printed it
            listed = ", ".join(known[:12]) or "none"
            raise NoFigure(f"{place} has no key '{key}'.{nearest(key, known)} It has: {listed}")
        return [value[key]]

    return step


def _item(index: str) -> _Step:
    def step(value: Any, place: str) -> list[Any]:
        if not isinstance(value, list):
            raise NoFigure(f"{place} is {shown(value)}, not a list")
        if index == "*":
            return value
        try:
            return [value[int(index)]]
        except IndexError:
            raise NoFigure(f"{place} has {len(value)} items, and no [{index}]") from None

    return step
