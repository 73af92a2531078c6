"""On which line of a TOML file each key stands: tomllib does not say.

For text that tomllib has accepted. Keys inside inline tables and items of arrays have the line of the key that holds
them.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping
from typing import Any

Path = tuple[str | int, ...]

_HEADER = re.compile(r"\s*(\[\[?)(.+?)\]\]?\s*(?:#.*)?$")
_KEY = re.compile(r"""\s*((?:[\w-]+|"[^"]*"|'[^']*')(?:\s*\.\s*(?:[\w-]+|"[^"]*"|'[^']*'))*)\s*=""")
_TOKEN = re.compile(r"""\"{3}|'{3}|"(?:[^"\\]|\\.)*"|'[^']*'|\#.*|[\[\]{}]|.""")
_CLOSING = {'"""': re.compile(r'(?:[^"\\]|\\.|"(?!""))*("{3,5})'), "'''": re.compile(r"(?:[^']|'(?!''))*('{3,5})")}


def key_lines(text: str) -> dict[Path, int]:
    """Line (from 1) of every table header and key: `("build", 0)`, `("build", 0, "target")`."""
    lines: dict[Path, int] = {}
    counts: dict[Path, int] = {}
    table: Path = ()
    value = _Value()
    for number, line in enumerate(text.splitlines(), 1):
        if value.is_open:
            value.scan(line)
        elif header := _HEADER.match(line):
            table = _place(_parts(header[2]), counts)
            if header[1] == "[[":
                counts[table] = counts.get(table, -1) + 1
                table = (*table, counts[table])
            lines.setdefault(table, number)
        elif key := _KEY.match(line):
            parts = _parts(key[1])
            for end in range(1, len(parts) + 1):
                lines.setdefault((*table, *parts[:end]), number)
            value.scan(line[key.end() :])
    return lines


class _Value:
    """Whether a value goes on in the next line. Every character is looked at once, however long the value."""

    def __init__(self) -> None:
        self._depth = 0
        self._quote = ""

    @property
    def is_open(self) -> bool:
        """Whether it has an end to come."""
        return bool(self._quote or self._depth > 0)

    def scan(self, line: str) -> None:
        """Go on with one line."""
        position = 0
        while position < len(line):
            if self._quote:
                end = _CLOSING[self._quote].match(line, position)
                if end is None:
                    return
                position, self._quote = end.end(), ""
                continue
            token = _TOKEN.match(line, position)
            assert token is not None, "the last alternative is any character"
            position = token.end()
            if token[0] in _CLOSING:
                self._quote = token[0]
            elif token[0] in "[{":
                self._depth += 1
            elif token[0] in "]}":
                self._depth -= 1


def line_of_error(error: tomllib.TOMLDecodeError, text: str) -> int:
    """Where `text` is not TOML. Python before 3.14 has no attribute for it, and says it in the message."""
    _, found, rest = str(error).partition("(at line ")
    digits = rest.partition(",")[0]
    said = int(digits) if found and digits.isdigit() else len(text.splitlines()) or 1
    return getattr(error, "lineno", None) or said


def line_of(path: Path, lines: Mapping[Path, int]) -> int:
    """The line of `path`, or of what holds it; 1 for the whole file."""
    return next((lines[path[:end]] for end in range(len(path), 0, -1) if path[:end] in lines), 1)


def _parts(dotted: str) -> tuple[str, ...]:
    """`a."b.c"` as its parts, read by tomllib itself; none for what only looks like a key."""
    try:
        table: Any = tomllib.loads(f"{dotted} = 0")
    except tomllib.TOMLDecodeError:
        return ()
    parts = []
    while isinstance(table, dict):
        ((name, table),) = table.items()
        parts.append(name)
    return tuple(parts)


def _place(parts: tuple[str, ...], counts: Mapping[Path, int]) -> Path:
    """The path of a header: a name of an array of tables on the way means its last table."""
    place: Path = ()
    for position, name in enumerate(parts, 1):
        place = (*place, name)
        if place in counts and position < len(parts):
            place = (*place, counts[place])
    return place
