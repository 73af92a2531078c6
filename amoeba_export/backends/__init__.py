"""How a device is measured or estimated. One module per backend; `BACKENDS` is the list, entry points add to it.

A backend answers *can it measure here* before anything is written, says what the device is, and gives the latency of
models: artifacts on disk, or bare dims, for which it makes a graph with random weights (speed depends on no value).
`measure_latency` is how the rest of amoeba asks: it checks what backends promise, ours and those of others.
"""

from __future__ import annotations

import importlib
import math
import queue
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any, Protocol, cast

from amoeba_export.errors import AmoebaError, MeasurementFailed, TargetError, TargetUnavailable, UnknownName
from amoeba_export.ir import SILENT, DenseArchitecture, Latency, Progress, Source, Target, Workload

ENTRY_POINT_GROUP = "amoeba_export.backends"

ROUNDS = 3
"""Rounds of a measurement unless told otherwise: the median of three survives one bad minute."""

SPARE_S = 60.0
"""Seconds that a plug-in may take beyond the time limits of all its models."""

TIME_LIMIT_S = 120.0
"""Seconds that opening and timing one model once may take."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """One model to be measured.

    Attributes:
        artifact: An artifact's folder (with `onnx/`, `safetensors/` or `gguf/` in it), or None: the backend then makes
            a graph of `dense` with random weights.
        label: How messages call it.
    """

    dense: DenseArchitecture
    artifact: Path | None = None
    dtype: str = "fp32"
    label: str = "the model"


@dataclass(frozen=True, slots=True, kw_only=True)
class Availability:
    """Whether a backend can work here and now; if not, why, and what to do about it."""

    ok: bool
    reason: str = ""
    next_step: str = ""


def availability_of(ask: Callable[[], object]) -> Availability:
    """Whether `ask`, which describes a device, gets an answer; if not, why."""
    try:
        ask()
    except TargetError as error:
        return Availability(ok=False, reason=error.what.rstrip("."), next_step=error.next_step or "")
    return Availability(ok=True)


class Backend(Protocol):
    """What a backend offers. A module, or an object in one.

    Attributes:
        source: What its latencies are. Everything but `measured` is called an estimate wherever it appears.
        containers: The formats it runs, the preferred one first; empty when it needs no artifact.
        options_model: A pydantic model of the target's `[options]` table.
    """

    @property
    def source(self) -> Source: ...  # noqa: D102 - documented above

    @property
    def containers(self) -> tuple[str, ...]: ...  # noqa: D102 - documented above

    @property
    def options_model(self) -> Any: ...  # noqa: D102 - documented above

    def check(self, target: Target) -> Availability:
        """Whether `target` can be measured. Cheap, and true: after `ok`, `measure` does not fail for want of parts."""

    def describe(self, target: Target) -> Mapping[str, str]:
        """What is known of the device before measuring. Equal for equal conditions: cost tables are cached by it."""

    def measure(
        self,
        subjects: Sequence[Subject],
        workload: Workload,
        *,
        target: Target,
        progress: Progress = SILENT,
        rounds: int = ROUNDS,
        time_limit_s: float = TIME_LIMIT_S,
    ) -> list[Latency | TargetError]:
        """One result per subject, in order.

        A subject that hangs longer than `time_limit_s`, crashes or runs out of memory has a `TargetError` as its result
        and does not spoil the others.

        Raises:
            TargetError: Nothing can be measured at all.
        """


BACKENDS: Mapping[str, str] = {
    "onnxruntime": "amoeba_export.backends.onnxruntime:BACKEND",
    "genai": "amoeba_export.backends.genai:BACKEND",
    "openvino": "amoeba_export.backends.openvino:BACKEND",
    "torch": "amoeba_export.backends.torch:BACKEND",
    "llamacpp": "amoeba_export.backends.llamacpp:BACKEND",
    "ssh": "amoeba_export.backends.ssh",
    "command": "amoeba_export.backends.command",
    "analytic": "amoeba_export.backends.analytic",
    "recorded": "amoeba_export.backends.recorded",
}
"""Built-in backends: name, and where the object is. Imported when first used."""


def list_backends() -> list[str]:
    """Names of all backends, those of installed plug-ins included."""
    return sorted({*BACKENDS, *_plug_ins()})


def find_backend(name: str) -> Backend:
    """The backend called `name`.

    Raises:
        UnknownName: There is none.
        TargetUnavailable: A plug-in's module cannot be imported.
    """
    if name in BACKENDS:
        module, _, attribute = BACKENDS[name].partition(":")
        loaded: Any = importlib.import_module(module)
        return cast(Backend, getattr(loaded, attribute) if attribute else loaded)
    plug_ins = _plug_ins()
    if name not in plug_ins:
        raise UnknownName("backend", name, list_backends())
    try:
        loaded = plug_ins[name].load()
    except (ImportError, AttributeError) as error:
        raise TargetUnavailable(
            f"the plug-in '{plug_ins[name].value}' of backend '{name}' cannot be imported: {error}",
            "Install or repair the package that brings it.",
        ) from error
    return cast(Backend, loaded() if isinstance(loaded, type) else loaded)


def _plug_ins() -> dict[str, EntryPoint]:
    """Backends of other packages. Built-in names cannot be taken over."""
    return {entry.name: entry for entry in entry_points(group=ENTRY_POINT_GROUP) if entry.name not in BACKENDS}


def measure_latency(
    subjects: Sequence[Subject],
    workload: Workload,
    *,
    target: Target,
    progress: Progress = SILENT,
    rounds: int = ROUNDS,
    time_limit_s: float = TIME_LIMIT_S,
) -> list[Latency | TargetError]:
    """Measure `subjects` with the target's backend, and hold the backend to its promises.

    A backend that hangs is given up after the time that all its subjects may take together; one that raises, or gives
    times that are not positive and finite, has a `MeasurementFailed` put in place of its result.

    Returns:
        One `Latency` or `TargetError` per subject, in order.

    Raises:
        TargetError: The target is not available, or its backend failed as a whole.
        UnknownName: No such backend.
    """
    backend = find_backend(target.backend)
    availability = backend.check(target)
    if not availability.ok:
        raise TargetUnavailable(f"Target '{target.name}' cannot be used: {availability.reason}", availability.next_step)

    def measure() -> list[Latency | TargetError]:
        return backend.measure(
            subjects, workload, target=target, progress=progress, rounds=rounds, time_limit_s=time_limit_s
        )

    if target.backend in BACKENDS:  # ours keep time themselves, and Ctrl-C reaches them here
        results = measure()
    else:
        results = _guarded(measure, target, patience_s=SPARE_S + 1.5 * time_limit_s * rounds * max(1, len(subjects)))
    if len(results) != len(subjects):
        raise TargetError(f"The backend '{target.backend}' gave {len(results)} results for {len(subjects)} models.")
    return [_checked(result, subject, target) for result, subject in zip(results, subjects, strict=True)]


def _guarded(
    measure: Callable[[], list[Latency | TargetError]], target: Target, *, patience_s: float
) -> list[Latency | TargetError]:
    """Run a plug-in's `measure` in a thread: one that hangs cannot be stopped, but it can be left behind."""
    outcome: queue.Queue[list[Latency | TargetError] | BaseException] = queue.Queue()

    def work() -> None:
        try:
            outcome.put(measure())
        except BaseException as error:  # handed to the caller's thread, which judges it
            outcome.put(error)

    threading.Thread(target=work, name=f"measure-{target.name}", daemon=True).start()
    try:
        result = outcome.get(timeout=patience_s)
    except queue.Empty:
        raise TargetError(
            f"The backend '{target.backend}' gave no answer within {patience_s:.0f} s.",
            next_step="Raise the time limit, or report it to the backend's authors.",
        ) from None
    if isinstance(result, AmoebaError) or (isinstance(result, BaseException) and not isinstance(result, Exception)):
        raise result
    if isinstance(result, BaseException):
        raise TargetError(
            f"The backend '{target.backend}' failed: {type(result).__name__}: {result}",
            next_step="Report it to the backend's authors; --debug shows where.",
        ) from result
    return result


def _checked(result: Latency | TargetError, subject: Subject, target: Target) -> Latency | TargetError:
    """`result`, or an error in place of times that cannot be."""
    if isinstance(result, TargetError):
        return result
    for phase, timing in (("decode", result.decode), ("prefill", result.prefill)):
        for value in (timing.p50_ms, timing.p90_ms):
            if not (math.isfinite(value) and value > 0):
                return MeasurementFailed(
                    subject.label, target.name, f"{phase} took {value} ms, which cannot be", "Measure again."
                )
    return result
