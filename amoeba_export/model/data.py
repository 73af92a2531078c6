"""Calibration data as it lies on disk or on the hub: documents, and multiple-choice items."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from amoeba_export.errors import BadRecord, EmptyData, InputError, NotFound, NotText
from amoeba_export.reading.records import parse_record

MAX_BYTES = 16 * 2**20
"""What is read of a file, and kept of a hub data set: more than any recipe samples from."""

MAX_CHOICES = 26


class DataRecipe(BaseModel):
    """Where samples come from. Exactly one of `file` and `hub` is set.

    Attributes:
        file: A text file, a `.jsonl` file of documents, or a `.jsonl` file of multiple-choice items; relative to the
            recipe.
        hub: Id of a data set, read with `datasets` (the `data` extra).
        config: Configuration of the hub data set.
        split: Split of the hub data set.
        kind: `text` is cut into windows; `choices` asks one multiple-choice question per sample.
        fields: Fields of a record that make one document, joined by newlines.
        window: Tokens of a text sample; longest multiple-choice prompt.
        scored: Last tokens of each window that are predicted, the others only being context; all of them when left out.
        samples: Samples that the search sees.
        heldout: Further samples, for the quality of each shape.
        batch: Samples in one forward.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    file: str | None = None
    hub: str | None = None
    config: str | None = None
    split: str = "train"
    kind: Literal["text", "choices"] = "text"
    fields: tuple[str, ...] = ("text",)
    window: Annotated[int, Field(ge=2)] = 256
    scored: Annotated[int, Field(ge=1)] | None = None
    samples: Annotated[int, Field(ge=1)] = 16
    heldout: Annotated[int, Field(ge=0)] = 8
    batch: Annotated[int, Field(ge=1)] = 4

    @model_validator(mode="after")
    def _one_source(self) -> DataRecipe:
        if (self.file is None) == (self.hub is None):
            raise ValueError("give either 'file' or 'hub'")
        return self


@dataclass(frozen=True, slots=True)
class Item:
    """One multiple-choice question; `answer` is the position of the right choice."""

    question: str
    choices: tuple[str, ...]
    answer: int

    @property
    def prompt(self) -> str:
        """The zero-shot form of MMLU: the question, one lettered line per choice, and `Answer:`."""
        lines = [f"{letter}. {choice}" for letter, choice in zip(LETTERS, self.choices, strict=False)]
        return "\n".join([self.question, *lines, "Answer:"])

    @property
    def answered(self) -> str:
        """The prompt with the right answer after it: a question as text."""
        return f"{self.prompt} {LETTERS[self.answer]}. {self.choices[self.answer]}"


LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


def source_name(recipe: DataRecipe) -> str:
    """What errors call the data."""
    return recipe.file or f"{recipe.hub}:{recipe.split}"


def read_documents(recipe: DataRecipe) -> list[str]:
    """The texts of `recipe`: the whole text file as one document, or one document per record.

    Raises:
        NotFound: There is no such file.
        InputError: It is empty, not text, or a record lacks a field; or the hub data set cannot be read.
    """
    if recipe.file is not None and not recipe.file.endswith(".jsonl"):
        return [_read_text(Path(recipe.file))]
    documents = []
    for line, record in _records(recipe):
        parts = [_field(record, field, recipe, line) for field in recipe.fields]
        if document := "\n".join(part for part in parts if part):
            documents.append(document)
    if not documents:
        raise EmptyData(source_name(recipe))
    return documents


def read_items(recipe: DataRecipe) -> list[Item]:
    """The multiple-choice items of `recipe`: records with `question` (or `context`), `choices` and `answer`.

    Raises:
        NotFound: There is no such file.
        InputError: As `read_documents`, or an item's choices or answer make no sense.
    """
    items = [_item(record, recipe, line) for line, record in _records(recipe)]
    if not items:
        raise EmptyData(source_name(recipe))
    return items


def _item(record: Mapping[str, Any], recipe: DataRecipe, line: int) -> Item:
    question = _field(
        record, "context" if "context" in record and "question" not in record else "question", recipe, line
    )
    missing = [field for field in ("choices", "answer") if field not in record]
    if missing:
        raise BadRecord(source_name(recipe), line, _lacks(missing[0], record))
    choices, answer = record["choices"], record["answer"]
    if not isinstance(choices, list) or not all(isinstance(choice, str) for choice in choices):
        raise BadRecord(source_name(recipe), line, "has a field 'choices' that is not a list of texts")
    if not 2 <= len(choices) <= MAX_CHOICES:
        raise BadRecord(source_name(recipe), line, f"has {len(choices)} choices; 2 to {MAX_CHOICES} can be asked")
    if isinstance(answer, bool) or not isinstance(answer, int) or not 0 <= answer < len(choices):
        raise BadRecord(source_name(recipe), line, f"has the answer {answer!r}, which is no position in its choices")
    return Item(question, tuple(choices), answer)


def _field(record: Mapping[str, Any], field: str, recipe: DataRecipe, line: int) -> str:
    if field not in record:
        raise BadRecord(source_name(recipe), line, _lacks(field, record))
    if not isinstance(record[field], str):
        raise BadRecord(source_name(recipe), line, f"has a field '{field}' that is not text")
    return str(record[field])


def _lacks(field: str, record: Mapping[str, Any]) -> str:
    return f"has no field '{field}'; it has {', '.join(map(repr, record)) or 'none at all'}"


def _records(recipe: DataRecipe) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """(line or row number from 1, record)."""
    if recipe.file is None:
        yield from enumerate(_hub_records(recipe), start=1)
        return
    for line, text in enumerate(_read_text(Path(recipe.file)).split("\n"), start=1):
        if not text.strip():
            continue
        yield line, parse_record(text, recipe.file, line)


def _read_text(path: Path) -> str:
    """The file, or whole lines of its first `MAX_BYTES`."""
    if not path.is_file():
        raise NotFound("The calibration data", path)
    with path.open("rb") as file:
        content = file.read(MAX_BYTES + 1)
    if len(content) > MAX_BYTES:
        content = content[: content.rfind(b"\n", 0, MAX_BYTES) + 1]
    if not content.strip():
        raise EmptyData(path)
    if (zero := content.find(b"\0")) >= 0:
        raise NotText(path, zero)  # valid UTF-8, and yet no text file has one
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise NotText(path, error.start) from error


def _hub_records(recipe: DataRecipe) -> Iterator[Mapping[str, Any]]:
    try:
        import datasets
    except ModuleNotFoundError as error:
        raise InputError(
            f"The data set '{recipe.hub}' needs the package datasets, which is not installed.",
            next_step="Install it with: pip install 'amoeba-export[data]', or give a file.",
        ) from error
    try:
        stream: Iterable[Mapping[str, Any]] = datasets.load_dataset(
            recipe.hub, recipe.config, split=recipe.split, streaming=True
        )
        size_bytes = 0
        for record in stream:
            yield record
            size_bytes += sum(len(value) for value in record.values() if isinstance(value, str))
            if size_bytes > MAX_BYTES:
                return
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise InputError(
            f"The data set '{recipe.hub}' cannot be read: {str(error).splitlines()[0]}",
            where=source_name(recipe),
            next_step="Check its id, configuration and split, and the network; or give a file.",
        ) from error
