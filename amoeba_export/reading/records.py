"""Text and JSONL files that users give us, read with errors that name the line."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from amoeba_export.errors import BadRecord, EmptyData, NotFound, NotText
from amoeba_export.reading.json_object import parse_json_object

CORRECT = "Correct the line."


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


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """What a line of a JSONL file, or a row of a data set, has in it, and where it is from.

    Attributes:
        fields: As they were read.
        path: Where from, for errors.
        line: Which one, from 1.
        wording: As of `BadRecord`.
    """

    fields: Mapping[str, Any]
    path: str | Path
    line: int
    wording: Mapping[str, str] = field(default_factory=dict)

    def __contains__(self, name: str) -> bool:
        return name in self.fields

    def bad(self, problem: str) -> BadRecord:
        """The error that says what is wrong with it."""
        return BadRecord(self.path, self.line, problem, **self.wording)

    def value(self, name: str) -> Any:
        """What it has under that name. Raises `BadRecord` where it has nothing."""
        if name not in self.fields:
            raise self.bad(f"has no field '{name}'; it has {self.names}")
        return self.fields[name]

    def text(self, name: str) -> str:
        """A text. Raises `BadRecord` where it has none under that name."""
        text = self.value(name)
        if not isinstance(text, str):
            raise self.bad(f"has a field '{name}' that is not text")
        return text

    @property
    def names(self) -> str:
        """Of its fields, for errors."""
        return ", ".join(map(repr, self.fields)) or "none at all"


def read_records(path: Path, *, what: str, next_step: str = CORRECT) -> Iterator[Record]:
    """The objects of a JSONL file. Blank lines are passed over.

    Args:
        path: The file.
        what: What errors call it.
        next_step: Of the error where a record is not what was expected.

    Raises:
        InputError: As `read_text`.
        BadRecord: A line is not a JSON object.
    """
    wording = {"what": what, "next_step": next_step}
    records = records_in(read_text(path, what=what), path, what=what, next_step=CORRECT)
    return (replace(record, wording=wording) for record in records)


def records_in(text: str, path: str | Path, **wording: str) -> Iterator[Record]:
    """As `read_records`, of a text that was read from `path`. `wording`: as of `BadRecord`, which it raises."""
    for line, one in enumerate(text.split("\n"), start=1):
        if not one.strip():
            continue
        try:
            fields = parse_json_object(one)
        except ValueError as error:
            problem = str(error).removeprefix("it ")
            problem = problem if problem != str(error) else f"cannot be read: {problem}"
            raise BadRecord(path, line, problem, **wording) from error
        yield Record(fields=fields, path=path, line=line, wording=wording)
