"""Text and JSONL files that users give us, read with errors that name the line."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from amoeba_export.errors import BadRecord, EmptyData, NotFound, NotText


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
        try:
            record = json.loads(text)
        except ValueError as error:
            raise BadRecord(path, line, f"is not JSON ({error})", what=what, next_step="Mend the line.") from error
        if not isinstance(record, dict):
            raise BadRecord(path, line, "is not a JSON object", what=what, next_step="Mend the line.")
        yield line, record
