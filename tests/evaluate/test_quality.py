from __future__ import annotations

import json
from pathlib import Path

import pytest

from amoeba_export.errors import DamagedFile, InputError
from amoeba_export.evaluate import QualityFile, ShapeQuality, TaskScore, pareto, read_quality
from amoeba_export.ir import InputId, Shape


def quality(shape: str, num_params: int, loss: float | None, score: float | None = None) -> ShapeQuality:
    tasks = {}
    if score is not None:
        tasks["t"] = TaskScore(accuracy=score, accuracy_norm=0.5, score=score, stderr=0.01, num_items=10)
    return ShapeQuality(shape=Shape.parse(shape), num_params=num_params, prunable=0.5, loss=loss, tasks=tasks)


def test_the_front_is_what_no_smaller_or_equal_shape_beats() -> None:
    shapes = [
        quality("4x1", 100, 2.0),
        quality("3x1", 80, 2.5),
        quality("4x0.75", 80, 2.4),
        quality("2x1", 60, 2.45),
        quality("2x0.5", 30, 3.0),
        quality("3x0.5", 50, 3.1),
    ]
    assert [str(shape.shape) for shape in pareto(shapes)] == ["4x1", "4x0.75", "2x1", "2x0.5"]


def test_without_a_text_the_front_is_about_tasks() -> None:
    shapes = [quality("4x1", 100, None, 0.6), quality("3x1", 80, None, 0.7), quality("2x1", 60, None, 0.5)]
    assert [str(shape.shape) for shape in pareto(shapes)] == ["3x1", "2x1"]


def test_a_file_is_read_back_as_it_was_written(tmp_path: Path) -> None:
    file = QualityFile(
        subject={"model": "demo"},
        measured={"window": 64},
        shapes=(quality("4x1", 100, 2.0, 0.5), quality("2x1", 9, 3.0)),
    )
    file.write(tmp_path / "quality.json")
    assert read_quality(tmp_path / "quality.json") == file
    assert [path.name for path in tmp_path.iterdir()] == ["quality.json"]
    data = json.loads((tmp_path / "quality.json").read_text())
    assert data["pareto"] == ["4x1", "2x1"]
    assert data["shapes"][0]["task_average"] == 0.5


def test_a_file_that_is_none_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "quality.json"
    path.write_text('{"shapes": []}')
    with pytest.raises(DamagedFile):
        read_quality(path)
    path.write_text('{"schema_version": 9}')
    with pytest.raises(InputError, match="schema version 9"):
        read_quality(path)


def test_the_values_are_losses_where_a_text_was_measured_and_else_accuracies() -> None:
    both = QualityFile(subject={}, measured={}, shapes=(quality("4x1", 100, 2.0, 0.6), quality("2x1", 60, 2.5, 0.4)))
    assert (both.metric, both.values) == ("loss", {Shape(4, 1.0): 2.0, Shape(2, 1.0): 2.5})
    tasks = QualityFile(subject={}, measured={}, shapes=(quality("4x1", 100, None, 0.6),))
    assert (tasks.metric, tasks.values) == ("accuracy", {Shape(4, 1.0): 0.6})


def test_inputs_are_compared_by_content_and_not_by_name() -> None:
    file = QualityFile(subject={"inputs": {"model tiny": "a" * 64, "adapter my adapter": "b" * 64}}, measured={})
    model = InputId(role="model", id="elsewhere", sha256="a" * 64)
    adapter = InputId(role="adapter", id="adapter", sha256="b" * 64)
    assert file.differences([adapter, model]) == []
    assert file.differences([model, InputId(role="adapter", id="other", sha256="c" * 64)]) == [
        "it was measured with the adapter my adapter (bbbbbbbbbbbb)",
        "here is the adapter other (cccccccccccc)",
    ]
    assert QualityFile(subject={"artifact": "x"}, measured={}).differences([model]) == [
        "it was measured on an artifact"
    ]
