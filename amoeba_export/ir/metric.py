"""What a model is judged by, and which way is better: decided here and nowhere else."""

from __future__ import annotations

from typing import Literal

ObjectiveName = Literal["loss", "perplexity", "accuracy"]
Mode = Literal["min", "max"]
"""Whether the lower or the higher value is better."""


def mode_of(metric: str) -> Mode:
    """`max` for an accuracy, `min` for a loss or a perplexity."""
    return "max" if metric == "accuracy" else "min"


def better(metric: float, other: float, mode: Mode) -> bool:
    """Strictly better."""
    return metric < other if mode == "min" else metric > other
