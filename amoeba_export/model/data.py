"""Calibration data as it lies on disk or on the hub: documents, and multiple-choice items."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from amoeba_export.errors import EmptyData, InputError
from amoeba_export.reading import MAX_NAME_BYTES, is_name_too_long
from amoeba_export.reading.questions import MultipleChoice, read_question
from amoeba_export.reading.records import Record, read_text, records_in

MAX_BYTES = 16 * 2**20
"""What is read of a file, and kept of a hub data set: more than any recipe samples from."""


class DataRecipe(BaseModel):
    """Where samples come from. Exactly one of `file` and `hub` is set.

    Attributes:
        file: A text file, a `.jsonl` file of documents, or a `.jsonl` file of multiple-choice items; relative to the
            recipe.
        hub: Id of a data set, read with `datasets` (the `data` extra).
        config: Configuration of the hub data set.
        split: Split of the hub data set.
        kind: `text`: windows of a text, each with the tokenizer's first token, such as `<bos>`. `choices`: one
            multiple-choice question per sample, in MMLU's format.
        fields: Fields of a record that make one document, joined by newlines.
        window: Tokens in a text sample, and most tokens in a multiple-choice prompt.
        scored: Number of tokens at the end of each window that count. The others are context. Default: all but the
            first.
        samples: Number of samples for the search.
        heldout: Number of other samples, for the quality of each shape.
        batch: Samples in one forward pass.
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
        if self.file is not None and is_name_too_long(self.file):
            raise ValueError(f"'file' has a name of more than {MAX_NAME_BYTES} bytes, which no file system holds")
        return self


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
        return [_read_text(recipe.file)]
    documents = []
    for record in _records(recipe):
        parts = [record.text(name) for name in recipe.fields]
        if document := "\n".join(part for part in parts if part):
            documents.append(document)
    if not documents:
        raise EmptyData(source_name(recipe))
    return documents


def read_questions(recipe: DataRecipe) -> list[MultipleChoice]:
    """The multiple-choice questions of `recipe`: records with `question` (or `context`), `choices` and `answer`.

    Raises:
        NotFound: There is no such file.
        InputError: As `read_documents`, or a question's choices or answer make no sense.
    """
    questions = [read_question(record) for record in _records(recipe)]
    if not questions:
        raise EmptyData(source_name(recipe))
    return questions


def _records(recipe: DataRecipe) -> Iterator[Record]:
    if recipe.file is not None:
        return records_in(_read_text(recipe.file), recipe.file)
    rows = enumerate(_hub_rows(recipe), start=1)
    return (Record(fields=row, path=source_name(recipe), line=line) for line, row in rows)


def _read_text(file: str) -> str:
    """The file, or whole lines of its first `MAX_BYTES`."""
    next_step = "Give a text file, a JSONL file, or the id of a data set."
    return read_text(Path(file), what="calibration data", next_step=next_step, max_bytes=MAX_BYTES)


def _hub_rows(recipe: DataRecipe) -> Iterator[Mapping[str, Any]]:
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
        for row in stream:
            yield row
            size_bytes += sum(len(value) for value in row.values() if isinstance(value, str))
            if size_bytes > MAX_BYTES:
                return
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise InputError(
            f"The data set '{recipe.hub}' cannot be read: {str(error).splitlines()[0]}",
            where=source_name(recipe),
            next_step="Check its id, configuration and split, and the network; or give a file.",
        ) from error
