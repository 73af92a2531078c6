"""Text and JSONL files that users give us, read with errors that name the line."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from amoeba_export.errors import BadRecord, EmptyData, NotFound, NotText
from amoeba_export.reading.json_object import parse_json_object


def read_text(
    path: Path, *, what: str, next_step: str = "Give a text file or a JSONL file.", max_bytes: int | None = None
) -> str:
    """The file as text.

    Args:
        path: The file.
        what: What errors call it, such as `training data`.
        next_step: Of the error where it is not text.
        max_bytes: Of a longer file, the whole lines of so many bytes; None for the whole file.

    Raises:
        NotFound: There is no such file.
        EmptyData: Nothing but white space is in it.
        NotText: It is not UTF-8, or has a zero byte in it, which no text file has.
    """
    if not path.is_file():
        raise NotFound(f"The {what}", path)
    with path.open("rb") as file:
        content = file.read() if max_bytes is None else file.read(max_bytes + 1)
    if max_bytes is not None and len(content) > max_bytes:
        content = content[: content.rfind(b"\n", 0, max_bytes) + 1]
    if not content.strip():
        raise EmptyData(path, what=what)
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
    return records_in(read_text(path, what=what), path, what=what, next_step="Correct the line.")


def records_in(text: str, path: str | Path, **wording: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """As `read_records`, of a text that was read from `path`. `wording`: as of `BadRecord`, which it raises."""
    for line, one in enumerate(text.split("\n"), start=1):
        if one.strip():
            yield line, parse_record(one, path, line, **wording)


def parse_record(text: str, path: str | Path, line: int, **wording: str) -> dict[str, Any]:
    """The object on one line. `wording`: as of `BadRecord`, which it raises."""
    try:
        return parse_json_object(text)
    except ValueError as error:
        problem = str(error).removeprefix("it ")
        problem = problem if problem != str(error) else f"cannot be read: {problem}"
        raise BadRecord(path, line, problem, **wording) from error


def text_field(record: Mapping[str, Any], field: str, path: str | Path, line: int, **wording: str) -> str:
    """A text of `record`. Raises `BadRecord` where it has none under that name."""
    text = checked_field(record, field, path, line, **wording)
    if not isinstance(text, str):
        raise BadRecord(path, line, f"has a field '{field}' that is not text", **wording)
    return text


def checked_field(record: Mapping[str, Any], field: str, path: str | Path, line: int, **wording: str) -> Any:
    """What `record` has under that name. Raises `BadRecord` where it has nothing."""
    if field not in record:
        raise BadRecord(path, line, f"has no field '{field}'; it has {shown_fields(record)}", **wording)
    return record[field]


def shown_fields(record: Mapping[str, Any]) -> str:
    """The names of its fields, for errors."""
    return ", ".join(map(repr, record)) or "none at all"
