"""Quality as one call: perplexity and tasks of a supernet at a shape, of all its shapes, or of an artifact."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from amoeba_export.application.subjects import EvaluateRequest, subject_of
from amoeba_export.artifact import sha256_file
from amoeba_export.errors import BadValue, NotFound, UnknownName, UsageError
from amoeba_export.evaluate import (
    Evaluation,
    Harness,
    QualityFile,
    measure_quality,
    read_tasks,
    task_names,
)
from amoeba_export.evaluate.quality import QUALITY_NAME
from amoeba_export.ir import SILENT, Progress
from amoeba_export.ir.dtype import TRAINED_DTYPES

TASK_FILES = (".jsonl", ".toml")
"""Endings of task files. Any other name is a task of lm-eval."""


def evaluate(request: EvaluateRequest, *, progress: Progress = SILENT) -> QualityFile:
    """Measure perplexity and multiple-choice accuracy of what `request` names.

    Returns:
        Every shape with its perplexity, its accuracy in each task (shares of 1, with standard errors) and its size;
        what `out` has, where there is one.

    Raises:
        UsageError: Nothing to measure, or settings that exclude each other.
        InputError: A file is missing, damaged or belongs to another model; or there is no strategy for the shape.
    """
    _check(request)
    measurement = _measurement(request)
    return measure_quality(subject_of(request, progress), measurement, out=_destination(request), progress=progress)


def _check(request: EvaluateRequest) -> None:
    if request.text is None and not request.tasks:
        raise UsageError("There is nothing to measure.", next_step="Give --text, --tasks, or both.")
    if request.grid and request.shape:
        raise UsageError("--grid and --shape exclude each other.", next_step="Leave one of them out.")
    if request.dtype not in TRAINED_DTYPES:
        raise UnknownName("dtype", request.dtype, TRAINED_DTYPES)
    for option, number, least in (
        ("--window", request.window, 2),
        ("--windows", request.windows, 1),
        ("--limit", request.limit, 1),
    ):
        if number is not None and number < least:
            raise BadValue(option, str(number), "a whole number above 0")


def _measurement(request: EvaluateRequest) -> Evaluation:
    """Read tasks and check names before any model is opened."""
    text = request.text
    if text is not None and not text.is_file():
        raise NotFound("The evaluation text", text)
    files = [Path(name) for name in request.tasks if Path(name).suffix in TASK_FILES]
    names = [name for name in request.tasks if Path(name).suffix not in TASK_FILES]
    read = tuple(task for path in files for task in read_tasks(path, limit=request.limit))
    facts: dict[str, Any] = {"limit": request.limit, "tasks": [*task_names(read), *names]}
    facts["task_files"] = {path.name: sha256_file(path) for path in files}
    if text is not None:
        facts |= {"text": text.name, "text_sha256": sha256_file(text)}
        facts |= {"window": request.window, "windows": request.windows}
    return Evaluation(
        facts=facts,
        text=text,
        window=request.window,
        windows=request.windows,
        tasks=read,
        harness=Harness.open(names, folder=request.task_folder) if names else None,
        limit=request.limit,
    )


def _destination(request: EvaluateRequest) -> Path | None:
    if request.out is None and request.grid and request.adapters:
        return request.adapters[-1] / QUALITY_NAME
    return request.out
