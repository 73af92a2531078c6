"""Measure shapes one after the other, into a file that a stopped run can go on with."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from amoeba_export.errors import NotFound, WrongModel
from amoeba_export.evaluate.choices import TaskScore, score_task
from amoeba_export.evaluate.harness import Harness
from amoeba_export.evaluate.model import LanguageModel
from amoeba_export.evaluate.perplexity import measure_perplexity, read_windows
from amoeba_export.evaluate.quality import QualityFile, ShapeQuality, read_quality
from amoeba_export.evaluate.tasks import Task
from amoeba_export.ir import SILENT, Progress, Shape
from amoeba_export.model.tokenizer import open_tokenizer

MAX_LENGTH = 2048
"""Tokens of a task's longest row, unless the model takes fewer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluatedModel:
    """What is measured.

    Attributes:
        facts: What it is, by content: results of different facts do not mix.
        tokenizer: The folder of its tokenizer.
        max_length: Tokens that it takes.
        shapes: With their sizes, and nothing measured yet.
        open: Makes a shape ready to run. One runs at a time.
    """

    facts: Mapping[str, Any]
    tokenizer: Path
    max_length: int
    shapes: tuple[ShapeQuality, ...]
    open: Callable[[Shape], LanguageModel]


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """What is measured on it: a text, tasks of ours, tasks of lm-eval.

    Attributes:
        facts: The same by content.
        windows: Of the text, at most; None for all.
        limit: Items of an lm-eval task, at most.
    """

    facts: Mapping[str, Any]
    text: Path | None = None
    window: int = 512
    windows: int | None = None
    tasks: tuple[Task, ...] = ()
    harness: Harness | None = None
    limit: int | None = None


def measure_quality(
    subject: EvaluatedModel, measurement: Evaluation, *, out: Path | None = None, progress: Progress = SILENT
) -> QualityFile:
    """Measure every shape that `out` does not have yet, and write it after each one.

    Raises:
        NotFound: The folder of `out` is not there.
        WrongModel: `out` is of another subject, or of other texts and tasks.
        InputError: The text is empty, not text, or too short.
    """
    file = QualityFile(subject=subject.facts, measured=measurement.facts)
    if out and not out.parent.is_dir():
        raise NotFound("The folder for the result", out.parent)
    if out and out.is_file():
        before = read_quality(out)
        if differences := _differences(before, file):
            raise WrongModel("The result that is there", differences, where=out)
        file = before
    tokenizer: Any = open_tokenizer(subject.tokenizer)
    texts = (
        read_windows(measurement.text, tokenizer, window=measurement.window, limit=measurement.windows)
        if measurement.text
        else []
    )
    done = {entry.shape for entry in file.shapes}
    max_length = min(subject.max_length, MAX_LENGTH)
    for entry in subject.shapes:
        if entry.shape in done:
            continue
        if len(subject.shapes) > 1:
            progress.note(f"Shape {entry.shape}")
        model = subject.open(entry.shape)
        measured = entry
        if texts:
            score = measure_perplexity(model, texts, progress=progress)
            measured = replace(measured, loss=score.loss, perplexity=score.perplexity)
        scores: dict[str, TaskScore] = {}
        for task in measurement.tasks:
            scores[task.name] = score_task(model, task, tokenizer, max_length=max_length, progress=progress)
        if measurement.harness:
            scores |= measurement.harness.score(
                model, tokenizer, max_length=max_length, limit=measurement.limit, progress=progress
            )
        file = replace(file, shapes=(*file.shapes, replace(measured, tasks=scores)))
        if out:
            file.write(out)
    return file


def _differences(before: QualityFile, now: QualityFile) -> list[str]:
    old, new = {**before.subject, **before.measured}, {**now.subject, **now.measured}
    return [f"{key} was {old.get(key)}, is {new.get(key)}" for key in old | new if old.get(key) != new.get(key)]
