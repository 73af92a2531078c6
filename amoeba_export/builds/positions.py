"""On which line of a TOML file each key stands: tomllib does not say.

For text that tomllib has accepted. Keys inside inline tables and items of arrays have the line of the key that holds
them.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping

Path = tuple[str | int, ...]

_HEADER = re.compile(r"\s*(\[\[?)(.+?)\]\]?\s*(?:#.*)?$")
_KEY = re.compile(r"""\s*((?:[\w-]+|"[^"]*"|'[^']*')(?:\s*\.\s*(?:[\w-]+|"[^"]*"|'[^']*'))*)\s*=""")


def key_lines(text: str) -> dict[Path, int]:
    """Line (from 1) of every table header and key: `("build", 0)`, `("build", 0, "target")`."""
    lines: dict[Path, int] = {}
    counts: dict[Path, int] = {}
    table: Path = ()
    waiting = ""  # a value that goes on over several lines
    for number, line in enumerate(text.splitlines(), 1):
        if waiting:
            waiting += "\n" + line
            waiting = "" if _is_complete(waiting) else waiting
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
            waiting = "" if _is_complete(line) else line
    return lines


def line_of(path: Path, lines: Mapping[Path, int]) -> int:
    """The line of `path`, or of what holds it; 1 for the whole file."""
    return next((lines[path[:end]] for end in range(len(path), 0, -1) if path[:end] in lines), 1)


def _parts(dotted: str) -> tuple[str, ...]:
    """`a."b.c"` as its parts, read by tomllib itself."""
    table, parts = tomllib.loads(f"{dotted} = 0"), []
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


def _is_complete(assignment: str) -> bool:
    try:
        tomllib.loads(assignment)
    except tomllib.TOMLDecodeError:
        return False
    return True
