"""The figures of the analytic model, fitted to points of one device and flow.

A device and flow has three figures: milliseconds per layer, share of the peak bandwidth, and compute. Few have more
than three points, so each figure has a usual value for its kind of flow and leaves it as far as the points insist: a
MAP estimate with relative errors of `noise` and log-normal figures. Without points, the usual value stands.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np

from amoeba_export.backends.points import Point

_ROUNDS = 100
_CONVERGED = 1e-10


@dataclass(frozen=True, slots=True, kw_only=True)
class Usual:
    """What is usual for a kind of flow.

    Attributes:
        per_layer_ms: Of launching a layer.
        efficiency: Share of the peak bandwidth.
        layer_spread, efficiency_spread: How much these differ between devices, as a log-normal's sigma.
        noise: Relative scatter of published runs of one model.
    """

    per_layer_ms: float
    efficiency: float
    layer_spread: float = 0.25
    efficiency_spread: float = 0.1
    noise: float = 0.03


_ENGINE = Usual(per_layer_ms=0.05, efficiency=0.85)

USUAL: Mapping[str, Usual] = MappingProxyType(
    {
        "edgellm": _ENGINE,  # one graph, launched at once
        "tensorrt-fp16": _ENGINE,
        "mlc": Usual(per_layer_ms=0.15, efficiency=0.85),  # kernel by kernel
        "vllm": Usual(per_layer_ms=0.2, efficiency=0.85),  # and from Python
        # On one Orin Nano Super a 2B model ran at 38 tokens per second where engines reached 60.
        "llamacpp": Usual(per_layer_ms=0.15, efficiency=0.5),
        # Processors: published runs of Llama-3.2-3B on one Pi 5 go from 4.5 to 5.6 tokens per second.
        "llamacpp-cpu": Usual(per_layer_ms=0.02, efficiency=0.65, efficiency_spread=0.05, noise=0.1),
        "onnxruntime-cpu": Usual(per_layer_ms=0.05, efficiency=0.6, noise=0.1),
    }
)
"""By flow. Round figures: the points decide, where there are some."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """What a data sheet says.

    Attributes:
        bandwidth_gb_s: Peak of the memory.
        is_cpu: Whether models run on the processor.
    """

    bandwidth_gb_s: float
    is_cpu: bool = False


DEVICES: Mapping[str, Device] = MappingProxyType(
    {
        "jetson-agx-orin": Device(bandwidth_gb_s=204.8),
        "jetson-orin-nx": Device(bandwidth_gb_s=102.4),
        "jetson-orin-nano": Device(bandwidth_gb_s=102),
        "jetson-orin-nano-68gbs": Device(bandwidth_gb_s=68),
        "jetson-agx-thor": Device(bandwidth_gb_s=273),
        "raspberry-pi-5": Device(bandwidth_gb_s=17.1, is_cpu=True),
        "rtx-4090": Device(bandwidth_gb_s=1008),
        "h100": Device(bandwidth_gb_s=3350),
    }
)
"""Those of `targets/points.csv` and of the shipped targets."""


def usual(device: str, flow: str) -> Usual:
    """What is usual for `flow` on `device`; for a flow that we know nothing of, a wide guess."""
    name = f"{flow}-cpu" if device in DEVICES and DEVICES[device].is_cpu else flow
    return USUAL.get(name) or Usual(per_layer_ms=0.1, efficiency=0.7, efficiency_spread=0.3)


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """Of one device and flow. `compute_tflops` is None where no prefill was timed."""

    bandwidth_gb_s: float
    efficiency: float
    per_layer_ms: float
    compute_tflops: float | None

    def predict_ms(self, point: Point) -> float:
        """What the analytic model says of a point; a prefill needs `compute_tflops`."""
        work = point.work()
        ms = work.memory_bytes / (self.efficiency * self.bandwidth_gb_s * 1e6)
        if point.kind == "prefill":
            assert self.compute_tflops is not None, "no prefill was timed"
            ms = max(ms, work.flops / (self.compute_tflops * 1e9))
        return work.layers * self.per_layer_ms + ms


def fit_figures(points: Sequence[Point], *, bandwidth_gb_s: float, prior: Usual) -> Figures:
    """The figures of one device and flow from its points; `prior` where there are none."""
    decodes = [point for point in points if point.kind == "decode"]
    start = np.log([prior.per_layer_ms, prior.efficiency])
    precision = np.array([prior.layer_spread, prior.efficiency_spread]) ** -2.0
    found = start.copy()
    works = [point.work() for point in decodes]
    layers = np.array([work.layers for work in works])
    peak_ms = np.array([work.memory_bytes for work in works]) / (bandwidth_gb_s * 1e6)
    measured = np.log([point.milliseconds for point in decodes])
    for _ in range(_ROUNDS if decodes else 0):  # Gauss-Newton
        launch, memory = layers * math.exp(found[0]), peak_ms / math.exp(found[1])
        total = launch + memory
        slopes = np.stack([launch / total, -memory / total], axis=1) / prior.noise
        errors = (np.log(total) - measured) / prior.noise
        hessian = slopes.T @ slopes + np.diag(precision)
        step = np.linalg.solve(hessian, -slopes.T @ errors - precision * (found - start))
        found += step * min(1.0, 0.5 / max(float(np.abs(step).max()), _CONVERGED))
        if np.abs(step).max() < _CONVERGED:
            break
    per_layer_ms, efficiency = math.exp(found[0]), min(1.0, math.exp(found[1]))
    rates = [
        point.work().flops / 1e9 / max(point.milliseconds - point.layers * per_layer_ms, 0.05 * point.milliseconds)
        for point in points
        if point.kind == "prefill"
    ]
    return Figures(
        bandwidth_gb_s=bandwidth_gb_s,
        efficiency=efficiency,
        per_layer_ms=per_layer_ms,
        compute_tflops=math.exp(float(np.mean(np.log(rates)))) if rates else None,
    )


def leave_one_out(points: Sequence[Point], *, bandwidth_gb_s: float, prior: Usual) -> list[tuple[Point, float]]:
    """Each point with the relative error of the figures that the others of its device and flow give.

    A prefill that is the only one of its device and flow is left out of the answer: nothing predicts it.
    """
    found = []
    for i, point in enumerate(points):
        figures = fit_figures([*points[:i], *points[i + 1 :]], bandwidth_gb_s=bandwidth_gb_s, prior=prior)
        if point.kind == "prefill" and figures.compute_tflops is None:
            continue
        found.append((point, figures.predict_ms(point) / point.milliseconds - 1))
    return found


LEAST_UNCERTAINTY = 0.05


def uncertainty_of(errors: Sequence[float]) -> float:
    """What an estimate states: the worst leave-one-out error, in whole percent, and never less than 5 %."""
    return max(LEAST_UNCERTAINTY, math.ceil(100 * max(map(abs, errors), default=1.0)) / 100)
