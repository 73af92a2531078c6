"""`quality.json`: what each shape of a supernet is worth, and which shapes are worth their size."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from amoeba_export.errors import DamagedFile
from amoeba_export.evaluate.choices import TaskScore
from amoeba_export.ir import InputId, Shape
from amoeba_export.ir.pareto import pareto_front
from amoeba_export.reading import WrongValue, check_schema, decode, read_json_object
from amoeba_export.replacing import replace_text

QUALITY_NAME = "quality.json"
"""In the folder of the adapter that was measured, where a search looks for it."""

SCHEMA = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class ShapeQuality:
    """What was measured of one shape.

    Attributes:
        shape: DEPTHxWIDTH.
        num_params: Number of weights of the dense model.
        prunable: Share of the supernet's prunable weights that it keeps.
        loss: Loss on the text, in nats per token; None without a text.
        perplexity: Perplexity of the text; None without a text.
        tasks: The tasks, by name.
    """

    shape: Shape
    num_params: int
    prunable: float
    loss: float | None = None
    perplexity: float | None = None
    tasks: Mapping[str, TaskScore] = field(default_factory=dict)

    @property
    def task_average(self) -> float | None:
        """Mean score of the tasks."""
        return sum(task.score for task in self.tasks.values()) / len(self.tasks) if self.tasks else None

    def to_json(self) -> dict[str, Any]:
        """One entry of `shapes`."""
        return {
            "shape": str(self.shape),
            "num_params": self.num_params,
            "prunable": self.prunable,
            "loss": self.loss,
            "perplexity": self.perplexity,
            "task_average": self.task_average,
            "tasks": {name: asdict(score) for name, score in self.tasks.items()},
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> ShapeQuality:
        """Read what `to_json` made. Raises `WrongValue`."""
        return decode(cls, {key: value for key, value in data.items() if key != "task_average"})


@dataclass(frozen=True, slots=True, kw_only=True)
class QualityFile:
    """Shapes measured alike.

    Attributes:
        subject: What they belong to: model, strategy, adapters, policy, by content.
        measured: What was measured: text, window, tasks, items, by content.
    """

    subject: Mapping[str, Any]
    measured: Mapping[str, Any]
    shapes: tuple[ShapeQuality, ...] = ()

    @property
    def metric(self) -> str:
        """What `values` are: `loss` where a text was measured (lower is better), else `accuracy`, of all tasks."""
        return "loss" if all(shape.loss is not None for shape in self.shapes) else "accuracy"

    @property
    def values(self) -> dict[Shape, float]:
        """The metric of every shape that has it."""
        figures = {one.shape: one.loss if self.metric == "loss" else one.task_average for one in self.shapes}
        return {shape: figure for shape, figure in figures.items() if figure is not None}

    def differences(self, inputs: Sequence[InputId]) -> list[str]:
        """In words, how what was measured differs from a supernet of `inputs`, by content. Empty: it is the same."""
        if "inputs" not in self.subject:
            return ["it was measured on an artifact"]
        then = {(name.split(" ", 1)[0], sha256): name for name, sha256 in self.subject["inputs"].items()}
        now = {(one.role, one.sha256): f"{one.role} {one.id}" for one in inputs}
        gone = [f"it was measured with the {name} ({key[1]:.12})" for key, name in then.items() if key not in now]
        new = [f"here is the {name} ({key[1]:.12})" for key, name in now.items() if key not in then]
        return gone + new

    def to_json(self) -> dict[str, Any]:
        """The file's content."""
        return {
            "schema_version": SCHEMA,
            "subject": dict(self.subject),
            "measured": dict(self.measured),
            "shapes": [shape.to_json() for shape in self.shapes],
            "pareto": [str(shape.shape) for shape in pareto(self.shapes)],
        }

    def write(self, path: Path) -> None:
        """Replace `path` in one rename."""
        replace_text(path, json.dumps(self.to_json(), indent=2) + "\n")


def read_quality(path: Path) -> QualityFile:
    """Read what `QualityFile.write` wrote.

    Raises:
        DamagedFile: It is not such a file.
        InputError: It is of another schema.
    """
    data = read_json_object(path, what="The quality file")
    check_schema(data, SCHEMA, what="quality file", where=path, next_step="Measure again, into another file.")
    try:
        listed = decode(tuple[dict[str, Any], ...], data.get("shapes"), "shapes")
        subject = decode(dict[str, Any], data.get("subject"), "subject")
        if "inputs" in subject:
            decode(dict[str, str], subject["inputs"], "subject.inputs")
        measured = decode(dict[str, Any], data.get("measured"), "measured")
        return QualityFile(subject=subject, measured=measured, shapes=tuple(map(ShapeQuality.from_json, listed)))
    except WrongValue as error:
        raise DamagedFile(path, f"not a quality file ({error})") from error


def pareto(shapes: Sequence[ShapeQuality]) -> list[ShapeQuality]:
    """Shapes that no other beats: smaller or as small, and better. By falling size.

    Better is a lower loss; without a text, a higher task average.
    """

    def badness(shape: ShapeQuality) -> float:
        if shape.loss is not None:
            return shape.loss
        return -(shape.task_average or 0.0)

    front = [shapes[i] for i in pareto_front([(shape.num_params, badness(shape)) for shape in shapes])]
    return sorted(front, key=lambda shape: shape.num_params, reverse=True)
