"""TOML files: one reader for all of them, with the bounds of `json_object`."""

from __future__ import annotations

import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from amoeba_export.errors import DamagedFile, NotFound
from amoeba_export.reading.bounds import MAX_DEPTH, MAX_INT, number_problem
from amoeba_export.reading.json_object import check_tree

MAX_BYTES = 2**20
"""Of a file that people write."""


def read_toml(
    path: Path,
    *,
    what: str,
    missing: str | None = None,
    next_step: str = "Correct the file.",
    max_bytes: int = MAX_BYTES,
) -> dict[str, Any]:
    """The tables of a TOML file.

    Args:
        path: The file.
        what: What errors call it, such as `The recipe`.
        missing: What to do when there is no such file.
        next_step: What to do when it is damaged.
        max_bytes: More is not read.

    Raises:
        NotFound: There is no such file.
        DamagedFile: It is not TOML, or has what no setting can be.
    """
    if not path.is_file():
        raise NotFound(what, path, next_step=missing)
    if (size_bytes := path.stat().st_size) > max_bytes:
        raise DamagedFile(path, f"{size_bytes:,} bytes of TOML, {max_bytes:,} can be read", next_step=next_step)
    try:
        return parse_toml(path.read_text(encoding="utf-8"))
    except ValueError as error:
        reason = str(error)
        if isinstance(error, UnicodeDecodeError | tomllib.TOMLDecodeError):
            reason = f"it is not TOML ({error})"
        raise DamagedFile(path, reason, next_step=next_step) from error


def parse_toml(text: str) -> dict[str, Any]:
    """The tables of `text`. Raises `tomllib.TOMLDecodeError`, and `ValueError` with what else is wrong, in words."""
    try:
        tables = tomllib.loads(text)
    except RecursionError as error:
        raise ValueError(f"its lists and tables are nested more than {MAX_DEPTH} deep") from error
    check_tree(tables)
    for value in _numbers(tables):
        if problem := number_problem(value, most=MAX_INT):
            raise ValueError(f"it has a number that {problem}")
    return tables


def _numbers(value: Any) -> Iterator[int | float]:
    if isinstance(value, int | float):
        yield value
    elif isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _numbers(item)
