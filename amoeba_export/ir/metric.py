"""What a model is judged by, and which way is better: decided here and nowhere else."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypeVar

from amoeba_export.errors import BadValue

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

_Value = TypeVar("_Value", float, "npt.NDArray[np.float64]")

ObjectiveName = Literal["loss", "perplexity", "accuracy"]
Mode = Literal["min", "max"]
"""Whether the lower or the higher value is better."""

KEPT_WEIGHTS = "kept_weights"
"""The kept share of the layers' weights: it stands in where a strategy has no measured quality."""


def mode_of(metric: str) -> Mode:
    """`max` for an accuracy or `KEPT_WEIGHTS`, `min` for a loss or a perplexity."""
    return "max" if metric in ("accuracy", KEPT_WEIGHTS) else "min"


def is_higher_better(metric: str) -> bool:
    """`mode_of`, as files say it."""
    return mode_of(metric) == "max"


def badness(metric: _Value, mode: Mode) -> _Value:
    """The value, its sign such that less is better."""
    return metric if mode == "min" else -metric


def nats(metric: str, value: float) -> float:
    """A loss or perplexity as a loss."""
    return math.log(value) if metric == "perplexity" else value


def after_rise(metric: str, value: float, rise: float) -> float:
    """A loss or perplexity after the loss rose by `rise` nats a token; a metric of another kind does not tell."""
    return value + rise if metric == "loss" else value * math.exp(rise) if metric == "perplexity" else value


def stricter(limit: float, by: float, mode: Mode) -> float:
    """A limit that is `by` better."""
    return limit - by if mode == "min" else limit + by


def better(metric: float, other: float, mode: Mode) -> bool:
    """Strictly better."""
    return metric < other if mode == "min" else metric > other


def good_enough(metric: float, least: float, mode: Mode) -> bool:
    """Not worse than `least`."""
    return not better(least, metric, mode)


@dataclass(frozen=True, slots=True, kw_only=True)
class QualityLimit:
    """The worst quality that is accepted: a value of the metric, or a share that it may be worse than the full model's.

    Exactly one of `value` and `loss_share` is set.
    """

    value: float | None = None
    loss_share: float | None = None

    @classmethod
    def parse_value(cls, text: str) -> QualityLimit:
        """Read `4.2`. Raises `BadValue`."""
        match = re.fullmatch(r"[0-9]{1,9}(\.[0-9]{1,12})?", text.strip())
        if not match or float(text) <= 0:
            raise BadValue("--quality", text, "a value of the quality metric, such as 4.2")
        return cls(value=float(text))

    @classmethod
    def parse_loss(cls, text: str) -> QualityLimit:
        """Read `5%`. Raises `BadValue`."""
        match = re.fullmatch(r"([0-9]{1,3}(?:\.[0-9]{1,6})?)\s*%", text.strip())
        if not match:
            raise BadValue("--quality-loss", text, "a share of the full model's quality, such as 5%")
        return cls(loss_share=float(match[1]) / 100)

    def resolve(self, full: float, mode: Mode) -> float:
        """The value; `full` is that of the full model."""
        if self.value is not None:
            return self.value
        assert self.loss_share is not None, "one of the two"
        return full * (1 + self.loss_share if mode == "min" else 1 - self.loss_share)

    def __str__(self) -> str:
        if self.value is not None:
            return f"quality {self.value:g} or better"
        return f"quality at most {100 * (self.loss_share or 0):g}% worse than the full model's"
