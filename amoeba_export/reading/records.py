"""Text and JSONL files that users give us, read with errors that name the line."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from amoeba_export.errors import BadRecord, EmptyData, NotFound, NotText
from amoeba_export.reading.json_object import parse_json_object


def read_text(path: Path, *, what: str) -> str:
    """The whole file as text.

    Args:
        path: The file.
        what: What errors call it, such as `training data`.

    Raises:
        NotFound: There is no such file.
        EmptyData: Nothing but white space is in it.
        NotText: It is not UTF-8, or has a zero byte in it, which no text file has.
    """
    if not path.is_file():
        raise NotFound(f"The {what}", path)
    content = path.read_bytes()
    if not content.strip():
        raise EmptyData(path, what=what)
    next_step = "Give a text file or a JSONL file."
    if (zero := content.find(b"\0")) >= 0:
        raise NotText(path, zero, what=what, next_step=next_step)
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise NotText(path, error.start, what=what, next_step=next_step) from error


def read_records(path: Path, *, what: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """The objects of a JSONL file with their line numbers, counted from 1. Blank lines are passed over.

    Raises:
        InputError: As `read_text`.
        BadRecord: A line is not a JSON object.
    """
    for line, text in enumerate(read_text(path, what=what).split("\n"), start=1):
        if not text.strip():
            continue
        yield line, parse_record(text, path, line, what=what, next_step="Mend the line.")


def parse_record(text: str, path: str | Path, line: int, **wording: str) -> dict[str, Any]:
    """The object on one line. `wording`: as of `BadRecord`, which it raises."""
    try:
        return parse_json_object(text)
    except ValueError as error:
        problem = str(error).removeprefix("it ")
        problem = problem if problem != str(error) else f"cannot be read: {problem}"
        raise BadRecord(path, line, problem, **wording) from error
