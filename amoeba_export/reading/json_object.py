"""JSON objects from files: one reader for all of them.

Python's own reader takes what JSON does not have (NaN, Infinity, numbers without end, a key twice) and stops with a
traceback on deep nesting. Whoever uses its result would have to think of each.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from amoeba_export.errors import DamagedFile, InputError, NotFound
from amoeba_export.reading.bounds import MAX_ANY, MAX_DEPTH, number_problem, shown

MAX_BYTES = 64 * 2**20
"""The plan of a model with 400 billion weights takes 50 MB."""
MAX_CONTAINERS = 2_000_000
"""Lists and tables: the densest JSON takes 30 times its size in memory."""

MAX_DIGITS = 40
"""Of an integer. tokenizer_config.json says "no limit" with 31."""

_BIG = re.compile(r"\d{40}|[eE]\+?\d\d")
"""Without a match no number can be out of range, and the fast path is safe."""
_RESTORE = "Get the file again and retry."


def read_json_object(
    path: Path, *, what: str, missing: str | None = None, next_step: str = _RESTORE, any_text: bool = False
) -> dict[str, Any]:
    """The JSON object in a file.

    Args:
        path: The file.
        what: What errors call it, such as `The plan`.
        missing: What to do when there is no such file.
        next_step: What to do when it is damaged.
        any_text: Allow NUL in strings: the tokens of a vocabulary are any text.

    Raises:
        NotFound: There is no such file.
        DamagedFile: It is not a JSON object, or is larger, deeper or further out of range than any that we know.
    """
    if not path.is_file():
        raise NotFound(what, path, next_step=missing)
    if (size_bytes := path.stat().st_size) > MAX_BYTES:
        raise DamagedFile(path, f"{size_bytes:,} bytes of JSON, {MAX_BYTES:,} can be read", next_step=next_step)
    try:
        return parse_json_object(path.read_bytes(), any_text=any_text)
    except ValueError as error:
        raise DamagedFile(path, str(error), next_step=next_step) from error


def parse_json_object(content: bytes | str, *, any_text: bool = False) -> dict[str, Any]:
    """The JSON object in `content`. Raises `ValueError` with what is wrong, in words."""
    try:
        text = content if isinstance(content, str) else content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"it is not JSON (byte {error.start} is not UTF-8)") from error
    if text.count("[") + text.count("{") > MAX_CONTAINERS:
        raise ValueError(f"it has more than {MAX_CONTAINERS:,} lists and tables")
    hooks: dict[str, Any] = {"parse_int": _int, "parse_float": _float} if _BIG.search(text) else {}
    try:
        data = json.loads(text, parse_constant=_constant, object_pairs_hook=_object, **hooks)
    except RecursionError as error:
        raise ValueError(f"its lists and tables are nested more than {MAX_DEPTH} deep") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"it is not JSON ({error})") from error
    if not isinstance(data, dict):
        raise ValueError("it is not a JSON object")
    check_tree(data, any_text=any_text)
    return data


def as_json(data: object, *, default: Callable[[Any], Any] | None = None) -> Any:
    """`data` as it is when it is written as JSON and read back: tuples are lists, keys are text."""
    return json.loads(json.dumps(data, default=default))


def check_schema(
    data: Mapping[str, Any],
    schema: int,
    *,
    since: int | None = None,
    what: str,
    where: str | Path | None,
    next_step: str,
) -> None:
    """Refuse content of another version. Raises `InputError`, or `DamagedFile` where there is no version at all.

    Args:
        data: The object read.
        schema: The version that we read.
        since: The oldest that we read too.
        what: What errors call it, such as `plan`.
        where: The file.
        next_step: What to do with another version.
    """
    if "schema_version" not in data:
        raise DamagedFile(where or what, f"it is not a {what} (it has no schema_version)", next_step=next_step)
    version = data["schema_version"]
    if type(version) is not int or not (schema if since is None else since) <= version <= schema:
        known = schema if since is None else f"up to {schema}"
        raise InputError(
            f"This {what} has schema version {shown(version)}; this amoeba reads {known}.",
            where=where,
            next_step=next_step,
        )


def check_tree(data: Any, *, any_text: bool = False) -> None:
    """Refuse strings and depths that break whoever uses them. Raises `ValueError`."""
    level = [data]
    for _ in range(MAX_DEPTH):
        below = []
        for container in level:
            items = container
            if isinstance(container, dict):
                items = container.values()
                for key in container:
                    _check_text(key, any_text)
            for item in items:
                if isinstance(item, str):
                    _check_text(item, any_text)
                elif isinstance(item, dict | list):
                    below.append(item)
        if not below:
            return
        level = below
    raise ValueError(f"its lists and tables are nested more than {MAX_DEPTH} deep")


def _check_text(text: str, any_text: bool) -> None:
    if text.isascii():
        if "\0" in text and not any_text:
            raise ValueError(f"it has a text with a zero byte: {shown(text)}")
        return
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(f"it has a text that is not Unicode: {shown(text)}") from error
    if "\0" in text and not any_text:
        raise ValueError(f"it has a text with a zero byte: {shown(text)}")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        for key, value in pairs:
            if made[key] != value:
                raise ValueError(f"it has the key {shown(key)} twice, with different values")
    return made


def _constant(name: str) -> float:
    raise ValueError(f"it has the number {name}, which JSON does not know")


def _int(text: str) -> int:
    if len(text) > MAX_DIGITS:
        raise ValueError(f"it has a number of {len(text)} digits: {text[:20]}...")
    return int(text)


def _float(text: str) -> float:
    if problem := number_problem(value := float(text), most=MAX_ANY):
        raise ValueError(f"it has a number that {problem}: {text[:40]}")
    return value
