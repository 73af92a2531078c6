"""Evaluate: perplexity and tasks of any model that gives logits, and the quality of every shape of a supernet."""

from amoeba_export.evaluate.choices import TaskScore, score_task
from amoeba_export.evaluate.harness import Harness
from amoeba_export.evaluate.measure import EvaluatedModel, Evaluation, measure_quality
from amoeba_export.evaluate.model import ArtifactModel, LanguageModel
from amoeba_export.evaluate.perplexity import TextScore, measure_perplexity, read_windows
from amoeba_export.evaluate.quality import QualityFile, ShapeQuality, pareto, read_quality
from amoeba_export.evaluate.tasks import Task, read_tasks, task_names

__all__ = [
    "ArtifactModel",
    "EvaluatedModel",
    "Evaluation",
    "Harness",
    "LanguageModel",
    "QualityFile",
    "ShapeQuality",
    "Task",
    "TaskScore",
    "TextScore",
    "measure_perplexity",
    "measure_quality",
    "pareto",
    "read_quality",
    "read_tasks",
    "read_windows",
    "score_task",
    "task_names",
]
