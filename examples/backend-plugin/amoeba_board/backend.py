"""The backend `board`: a module is enough, it needs no base class and no registration."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated

from pydantic import Field

from amoeba_export.backends import ROUNDS, TIME_LIMIT_S, Availability, Subject
from amoeba_export.backends.targets import Strict, parse_options
from amoeba_export.errors import TargetError
from amoeba_export.ir import SILENT, Latency, Progress, Source, Target, Timing, Workload


class Options(Strict):
    """The target's `[options]`: unknown keys and values out of range are reported by amoeba."""

    clock_mhz: Annotated[float, Field(gt=0)]
    memory_mb: Annotated[float, Field(gt=0)] = 4096


source: Source = "analytic"  # "measured", if yours asks a device
containers: tuple[str, ...] = ()  # ("onnx",), if yours runs files
options_model = Options


def check(target: Target) -> Availability:
    """Whether the board can be used: look for it here."""
    parse_options(target)
    return Availability(ok=True)


def describe(target: Target) -> Mapping[str, str]:
    """What timings depend on. Cost tables are cached by it."""
    return {"device": "board", "clock_mhz": f"{parse_options(target).clock_mhz:g}"}


def measure(
    subjects: Sequence[Subject],
    workload: Workload,
    *,
    target: Target,
    progress: Progress = SILENT,
    rounds: int = ROUNDS,
    time_limit_s: float = TIME_LIMIT_S,
) -> list[Latency | TargetError]:
    """One result per subject, in order; what cannot run has an error in its place."""
    options = parse_options(target)
    with progress.track(f"Counting cycles on {target.name}", len(subjects)) as advance:
        results: list[Latency | TargetError] = []
        for subject in subjects:
            results.append(_count(subject, workload, options, describe(target)))
            advance(1)
    return results


def _count(subject: Subject, workload: Workload, options: Options, device: Mapping[str, str]) -> Latency | TargetError:
    weights = subject.dense.num_params
    if weights * 4 > options.memory_mb * 2**20:
        return TargetError(f"{subject.label} does not fit the board.", next_step="Cut it smaller.")
    token_ms = weights / (options.clock_mhz * 1e3)
    prompt_ms = token_ms * workload.prompt_tokens / 8  # eight tokens share one read of the weights
    return Latency(
        decode=Timing(p50_ms=token_ms, p90_ms=token_ms, num_samples=0),
        prefill=Timing(p50_ms=prompt_ms, p90_ms=prompt_ms, num_samples=0),
        source=source,
        workload=workload,
        device=device,
        uncertainty=0.5,
    )
