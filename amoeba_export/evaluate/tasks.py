r"""Multiple-choice tasks, as data: a JSONL file of items, or a TOML file that says how to ask them.

    [[task]]
    name = "arc_easy"
    file = "arc_easy_val.jsonl"               beside the TOML file
    prompt = "Question: {context}\nAnswer:"    fields of an item in braces; choices follow after one space
    metric = "accuracy_norm"                  which of the two accuracies is the task's score

An item is {"context" or "question": text, "choices": [texts], "answer": position of the right one}. Without a prompt,
choices continue the context; with `style = "lettered"`, and for items that have a "question", they are listed with
letters, and the letters are the choices (as MMLU is asked).
"""

from __future__ import annotations

import re
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from amoeba_export.errors import EmptyData, InputError
from amoeba_export.reading import read_toml
from amoeba_export.reading.questions import LETTERS, read_question
from amoeba_export.reading.records import Record, read_records

WHAT = "task"
METRICS = ("accuracy", "accuracy_norm")
STYLES = ("continuation", "lettered")
_FIELD = re.compile(r"(\w+)((?:\[[^\[\]]+\])*)")
_KEYS = ("name", "file", "prompt", "style", "metric")


@dataclass(frozen=True, slots=True)
class Item:
    """One question as it is asked: `choices` continue `prompt` after a space; `answer` is the right one's position."""

    prompt: str
    choices: tuple[str, ...]
    answer: int


@dataclass(frozen=True, slots=True)
class Task:
    """Items under a name.

    Attributes:
        metric: `accuracy`: the choice with the highest probability. `accuracy_norm`: per character of the choice.
    """

    name: str
    items: tuple[Item, ...]
    metric: str = "accuracy"


def read_tasks(path: Path, *, limit: int | None = None, seed: int = 0) -> list[Task]:
    """The tasks of a TOML file, or the one of a JSONL file.

    Args:
        path: `.toml` or `.jsonl`.
        limit: Items a task, drawn evenly from all of them (files are often sorted); None for all.
        seed: Of the draw.

    Raises:
        InputError: A file is missing, empty, not text, or says something that it cannot.
    """
    if path.suffix != ".toml":
        return [_task(path.stem, path, {}, limit, seed)]
    entries = read_toml(path, what="The task file").get("task")
    if not isinstance(entries, list) or not entries:
        raise _wrong(path, "it has no [[task]]")
    tasks = []
    for number, entry in enumerate(entries, start=1):
        if not isinstance(entry, dict):
            raise _wrong(path, f"task {number} is not a table")
        unknown = sorted(set(entry) - set(_KEYS))
        if unknown:
            raise _wrong(path, f"task {number} has a key '{unknown[0]}'; it can have {', '.join(_KEYS)}")
        if not entry.get("file"):
            raise _wrong(path, f"task {number} names no file")
        for key, value in entry.items():
            if not isinstance(value, str):
                raise _wrong(path, f"task {number} has a {key} that is not text")
        for key, known in (("metric", METRICS), ("style", STYLES)):
            if key in entry and entry[key] not in known:
                raise _wrong(path, f"task {number} has the {key} '{entry[key]}'; it can be {' or '.join(known)}")
        file = path.parent / entry["file"]
        tasks.append(_task(entry.get("name", file.stem), file, entry, limit, seed))
    return tasks


def _task(name: str, path: Path, entry: Mapping[str, Any], limit: int | None, seed: int) -> Task:
    items = [_item(record, entry) for record in read_records(path, what=WHAT)]
    if not items:
        raise EmptyData(path, what=WHAT)
    if limit is not None and limit < len(items):
        chosen = np.sort(np.random.default_rng(seed).permutation(len(items))[:limit])
        items = [items[i] for i in chosen]
    return Task(name, tuple(items), entry.get("metric", "accuracy"))


def _item(record: Record, entry: Mapping[str, Any]) -> Item:
    asked = read_question(record)
    if "prompt" in entry:
        try:
            return Item(_filled(entry["prompt"], record.fields), asked.choices, asked.answer)
        except LookupError as error:
            raise record.bad(f"has no field {error} that the prompt names") from error
        except ValueError as error:
            raise record.bad(f"cannot fill the prompt ({error})") from error
    if entry.get("style", "lettered" if "question" in record else "continuation") == "continuation":
        return Item(asked.question, asked.choices, asked.answer)
    return Item(asked.prompt, tuple(LETTERS[: len(asked.choices)]), asked.answer)


def _filled(prompt: str, record: Mapping[str, Any]) -> str:
    """`prompt` with fields in braces, and items of theirs (`{choices[0]}`). No attributes, no formats: they reach far.

    Raises:
        LookupError: A field or an item that `record` does not have.
        ValueError: Braces that do not name a field.
    """
    filled = []
    for text, name, form, conversion in string.Formatter().parse(prompt):
        filled.append(text)
        if name is None:
            continue
        field = _FIELD.fullmatch(name)
        if form or conversion or field is None:
            raise ValueError(f"'{{{name}}}' is not the name of a field")
        value = record[field[1]]
        for item in re.findall(r"\[(.*?)\]", field[2]):
            if isinstance(value, list) and item.isdecimal():
                value = value[int(item[:9])]
            elif isinstance(value, dict):
                value = value[item]
            else:
                raise LookupError(repr(name))
        filled.append(str(value))
    return "".join(filled)


def task_names(tasks: Sequence[Task]) -> tuple[str, ...]:
    """Their names, of which none may be there twice. Raises `InputError`."""
    names = [task.name for task in tasks]
    for name in names:
        if names.count(name) > 1:
            raise InputError(f"There are two tasks named '{name}'.", next_step="Rename one, in a TOML file of tasks.")
    return tuple(names)


def _wrong(path: Path, problem: str) -> InputError:
    return InputError(
        f"This is not a task file: {problem}.", where=path, next_step="See docs/finetuning.md for its form."
    )
