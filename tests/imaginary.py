"""A backend whose machine follows a known rule: the closed loop is tested against it without a clock."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from amoeba_export.backends import Availability, Subject
from amoeba_export.backends.targets import Strict
from amoeba_export.errors import TargetError
from amoeba_export.ir import SILENT, DenseArchitecture, Latency, Progress, Target, Timing, Workload
from amoeba_export.profile.rounds import scatter_of


class Options(Strict):
    """What is peculiar about the machine.

    Attributes:
        artifact_factor: How much slower files on disk run than a graph with random weights.
        dtype_factors: Time of each precision over that of fp32.
        scatter: How much slower than usual, as a share, files on disk run in each round of a run, over and over.
    """

    artifact_factor: float = 1.0
    dtype_factors: Mapping[str, float] = {}
    scatter: tuple[float, ...] = (0.0,)


class Imaginary:
    """Time grows with the weights; a graph and an artifact of the same dims may differ by a factor. It slows down."""

    source: Literal["measured"] = "measured"
    containers = ("onnx",)
    options_model = Options

    def __init__(self) -> None:
        self.measured_artifacts: list[DenseArchitecture] = []
        self.pace = 1.0
        """How much slower all runs than usual."""

    def check(self, target: Target) -> Availability:
        return Availability(ok=True)

    def describe(self, target: Target) -> Mapping[str, str]:
        return {"device": "imaginary"}

    def measure(
        self,
        subjects: Sequence[Subject],
        workload: Workload,
        *,
        target: Target,
        progress: Progress = SILENT,
        rounds: int = 3,
        time_limit_s: float = 120.0,
    ) -> list[Latency | TargetError]:
        return [self._one(subject, workload, target, rounds) for subject in subjects]

    def _one(self, subject: Subject, workload: Workload, target: Target, rounds: int) -> Latency:
        options: Mapping[str, Any] = target.options
        factor, scatter = self.pace, [0.0]
        if subject.artifact is not None:
            assert (subject.artifact / "onnx" / "model.onnx").is_file()
            self.measured_artifacts.append(subject.dense)
            factor *= float(options.get("artifact_factor", 1.0))
            scatter = options.get("scatter", scatter)
        factor *= options.get("dtype_factors", {}).get(subject.dtype, 1.0)
        decode_ms = factor * (1 + sum(0.1 + 1e-5 * subject.dense.base.prunable_params(x) for x in subject.dense.layers))
        drift = _drift(rounds, scatter)
        noise = scatter_of(drift)
        return Latency(
            decode=Timing(p50_ms=decode_ms, p90_ms=1.1 * decode_ms, num_samples=9, noise=noise),
            prefill=Timing(p50_ms=5 * decode_ms, p90_ms=6 * decode_ms, num_samples=9, noise=noise),
            source="measured",
            workload=workload,
            rounds=tuple((x * decode_ms, x * 5 * decode_ms) for x in drift),
        )


def _drift(rounds: int, scatter: Sequence[float]) -> list[float]:
    """The time of each round over that of the middle one."""
    return [(1 + 0.1 * i) / (1 + 0.1 * (rounds // 2)) * (1 + scatter[i % len(scatter)]) for i in range(rounds)]


BACKEND = Imaginary()
