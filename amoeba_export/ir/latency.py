"""Targets, workloads, budgets and what was measured."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from amoeba_export.errors import BadValue
from amoeba_export.ir.limits import NO_LIMITS, RuntimeLimits

Metric = Literal["decode", "prefill", "e2e"]
"""`decode`: time per output token at the workload's KV length. `prefill`: time to first token. `e2e`: both."""

Source = Literal["measured", "recorded", "analytic"]
"""How a latency is known. Everything but `measured` is an estimate and is called one."""

_NUMBER = r"([0-9]{1,12}(?:\.[0-9]{1,20})?|\.[0-9]{1,20})"
"""No text of digits that becomes infinite."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """What the model is asked to do. Decode is timed with `prompt_tokens` in the KV cache.

    Attributes:
        prompt_tokens: Number of prompt tokens.
        generate_tokens: Number of tokens to generate; e2e includes them.
        batch: Number of sequences in a batch.
    """

    prompt_tokens: int = 128
    generate_tokens: int = 128
    batch: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """A device, the flow that runs models on it, and its power mode, from `targets/<name>.toml`.

    Attributes:
        description: One line for `amoeba targets`.
        backend: The backend that measures or estimates latencies.
        metric: The latency that a budget limits. `--metric` overrides it.
        dtypes: Precisions of the runtime, the preferred one first. A budget in percent refers to the full model in the
            first one.
        formats: Default of `--format`. The backend runs the first one.
        align: FFN sizes are multiples of this.
        memory_limit_mb: Most memory for the model in MiB, or None when unknown.
        flow: Name of the runtime.
        power_mode: The device's power mode that the figures hold for. Empty: it has only one.
        limits: Shapes that the runtime loads.
        options: Options of the backend.
        on_device: Backend and options that measure on the device itself. Empty: `backend` does.
        sources: Where the figures come from.
        aliases: Other names of the target.
    """

    name: str
    description: str
    backend: str
    metric: Metric = "decode"
    dtypes: tuple[str, ...] = ("fp32",)
    formats: tuple[str, ...] = ("onnx", "safetensors")
    align: int = 1
    memory_limit_mb: float | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    on_device: Mapping[str, Any] = field(default_factory=dict)
    sources: tuple[str, ...] = ()
    aliases: tuple[str, ...] = ()
    flow: str = ""
    power_mode: str = ""
    limits: RuntimeLimits = NO_LIMITS

    @property
    def dtype(self) -> str:
        """The preferred precision."""
        return self.dtypes[0]


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """Percentiles over the repeats of one measurement, in milliseconds.

    Attributes:
        noise: Relative scatter of the rounds around `p50_ms`, or None with fewer than two rounds.
    """

    p50_ms: float
    p90_ms: float
    num_samples: int
    noise: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Latency:
    """Decode (per token) and prefill (whole prompt) of one model on one target under one workload.

    Attributes:
        device: What the backend can say of the device: model, threads, provider, runtime versions, clocks.
        uncertainty: Relative half-width of an estimate (0.1 = plus or minus 10 %), or None when measured.
        memory_mb: Most memory in MiB that the measuring process occupied, runtime included, or None when unknown.
        rounds: Median decode and prefill of each round in milliseconds, in order; empty where no rounds were kept. Of
            models that were measured together, those of one round belong together.
    """

    decode: Timing
    prefill: Timing
    source: Source
    workload: Workload
    device: Mapping[str, str] = field(default_factory=dict)
    uncertainty: float | None = None
    memory_mb: float | None = None
    rounds: tuple[tuple[float, float], ...] = ()

    def as_when(self, then: Latency, now: Latency) -> Latency:
        """What this would have been at another time: scaled as one and the same model was measured `then` and `now`."""

        def scaled(timing: Timing, before: Timing, after: Timing) -> Timing:
            p50, p90 = after.p50_ms / before.p50_ms, after.p90_ms / before.p90_ms
            return replace(timing, p50_ms=timing.p50_ms * p50, p90_ms=timing.p90_ms * p90)

        return replace(
            self,
            decode=scaled(self.decode, then.decode, now.decode),
            prefill=scaled(self.prefill, then.prefill, now.prefill),
        )

    def of(self, metric: Metric, percentile: int = 50) -> float:
        """Milliseconds of `metric` at `percentile` (50 or 90). e2e = prefill + generate_tokens * decode."""
        if percentile == 90:
            return self._combined(metric, self.decode.p90_ms, self.prefill.p90_ms)
        return self._combined(metric, self.decode.p50_ms, self.prefill.p50_ms)

    def rounds_of(self, metric: Metric) -> list[float]:
        """Milliseconds of `metric` in each of `rounds`."""
        return [self._combined(metric, decode_ms, prefill_ms) for decode_ms, prefill_ms in self.rounds]

    def _combined(self, metric: Metric, decode_ms: float, prefill_ms: float) -> float:
        both_ms = prefill_ms + self.workload.generate_tokens * decode_ms
        return {"decode": decode_ms, "prefill": prefill_ms, "e2e": both_ms}[metric]


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """A latency limit: absolute in milliseconds, or a fraction of the full supernet on the same target.

    Exactly one of `limit_ms` and `fraction` is set.
    """

    metric: Metric = "decode"
    percentile: int = 50
    limit_ms: float | None = None
    fraction: float | None = None

    @classmethod
    def parse(cls, text: str, *, metric: Metric = "decode", percentile: int = 50) -> Budget:
        """Read `50ms`, `0.05s` or `75%`. Raises `BadValue`."""
        match = re.fullmatch(_NUMBER + r"\s*(ms|s|%)", text.strip())
        if not match or float(match[1]) <= 0 or (match[2] == "%" and float(match[1]) > 100):
            raise BadValue("A latency", text, "a time or a share of the full model, such as 50ms, 0.05s or 75%")
        value = float(match[1])
        if match[2] == "%":
            return cls(metric=metric, percentile=percentile, fraction=value / 100)
        return cls(metric=metric, percentile=percentile, limit_ms=value * (1000 if match[2] == "s" else 1))

    @classmethod
    def parse_throughput(cls, text: str, *, batch: int = 1, percentile: int = 50) -> Budget:
        """Read `30tok/s`, tokens of all `batch` sequences together, as a limit on decode. Raises `BadValue`."""
        match = re.fullmatch(_NUMBER + r"\s*tok(?:ens)?/s", text.strip())
        if not match or float(match[1]) <= 0:
            raise BadValue("A throughput", text, "tokens per second, such as 30tok/s")
        return cls(metric="decode", percentile=percentile, limit_ms=1000 * batch / float(match[1]))

    def resolve(self, full_ms: float | None = None) -> float:
        """The limit in milliseconds; a fraction needs `full_ms`, the full supernet's latency."""
        if self.limit_ms is not None:
            return self.limit_ms
        assert self.fraction is not None and full_ms is not None, "a relative budget needs the full model's latency"
        return self.fraction * full_ms

    def of(self, latency: Latency) -> float:
        """What it is about, in milliseconds."""
        return latency.of(self.metric, self.percentile)

    def limit_beside(self, full: Latency) -> float:
        """The limit in milliseconds, where the full supernet has this latency."""
        return self.resolve(self.of(full))

    def is_met(self, latency: Latency, full: Latency) -> bool:
        """Whether a latency is within it, taken as it is."""
        return self.of(latency) <= self.limit_beside(full)

    def use(self, latency: Latency, full: Latency) -> float:
        """The share that a latency takes of it."""
        return self.of(latency) / self.limit_beside(full)


def parse_megabytes(text: str) -> float:
    """Read `900MB`, `1.5GB`, `900MiB` or `2GiB` as MiB. Raises `BadValue`."""
    match = re.fullmatch(_NUMBER + r"\s*([MG])(i?)B", text.strip())
    if not match or float(match[1]) <= 0:
        raise BadValue("A memory limit", text, "an amount such as 900MB, 1.5GB or 2GiB")
    unit = (1024 if match[3] else 1000) ** (2 if match[2] == "M" else 3)
    return float(match[1]) * unit / 1024**2
