"""What came of a build, as data: `build-report.json`, from which every page of the report is made.

Torch-free, JSON in both directions. `EntryOutcome` also travels between processes and machines (see `engines`).
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from amoeba_export.artifact import FileEntry, FullModelRecord
from amoeba_export.builds.plan_record import PlanRecord
from amoeba_export.errors import AmoebaError, DamagedFile
from amoeba_export.ir import InputId
from amoeba_export.ir.frontier import Frontier
from amoeba_export.reading import check_schema, decode, read_json_object

REPORT_NAME = "build-report.json"
REPORT_SCHEMA = 1

Status = Literal["built", "up-to-date", "failed", "skipped"]
"""`skipped`: not asked for (`--only`), or not begun because the build was interrupted."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ErrorRecord:
    """Why an entry failed. `kind` is the class in `errors`, or the name of a Python error for a bug of ours.

    Attributes:
        kind: Name of the error.
        message: What happened.
        where: The file, key or position.
        next_step: What to do about it.
        exit_code: Exit code of its kind.
    """

    kind: str
    message: str
    where: str | None = None
    next_step: str | None = None
    exit_code: int = 1

    @classmethod
    def of(cls, error: BaseException) -> ErrorRecord:
        """The record of a caught error."""
        if isinstance(error, AmoebaError):
            return cls(
                kind=type(error).__name__,
                message=error.what,
                where=error.where,
                next_step=error.next_step,
                exit_code=error.exit_code,
            )
        return cls(
            kind=type(error).__name__,
            message=f"This is a bug in amoeba: {type(error).__name__}: {error}",
            next_step="Run 'amoeba --debug build --only NAME' and report it with the traceback and 'amoeba doctor'.",
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class LatencyFigures:
    """The limit, the promise, and what the target said.

    Attributes:
        metric: The latency that the budget limits.
        percentile: The percentile that the budget holds for.
        budget: The budget in amoeba.toml, such as `80%` or `50ms`; None without one.
        limit_ms: The budget in milliseconds on this target.
        predicted_ms: Predicted latency of the chosen shape; `uncertainty` is its relative half-width.
        uncertainty: Relative half-width of the prediction.
        measured_ms: `p50` and `p90`; None if the target is an estimate (`source` is not `measured`).
        full_ms: Latency of the uncut model in the same run.
        source: `measured`, or the kind of estimate.
        device: The description of the device by the backend.
    """

    metric: str
    percentile: int
    budget: str | None = None
    limit_ms: float | None = None
    predicted_ms: float | None = None
    uncertainty: float | None = None
    measured_ms: Mapping[str, float] | None = None
    full_ms: float | None = None
    source: str = "measured"
    device: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.measured_ms and f"p{self.percentile}" not in self.measured_ms:
            raise ValueError(f"p{self.percentile} is not among the measured latencies")

    @property
    def actual_ms(self) -> float | None:
        """What counts against the limit: the measured percentile, or the estimate where there is none."""
        return self.measured_ms[f"p{self.percentile}"] if self.measured_ms else self.predicted_ms


@dataclass(frozen=True, slots=True, kw_only=True)
class QualityFigures:
    """The calibrated metric of the chosen shape, of the uncut model, and the floor that the entry sets.

    Attributes:
        metric: The metric.
        value: Value of the chosen shape.
        full: Value of the uncut model.
        floor: The `quality_floor` of the entry.
        higher_is_better: Whether a higher value is better.
    """

    metric: str
    value: float
    full: float | None = None
    floor: float | None = None
    higher_is_better: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class EntryOutcome:
    """What came of one `[[build]]` entry.

    Attributes:
        name: Name of the entry.
        status: `built`, `up-to-date`, `failed`, or `skipped`: not asked for, or not started before an interruption.
        fingerprint: Digest of all inputs of the artifact. If it is the same, there is nothing to do.
        model: The supernet, as in amoeba.toml.
        target: The target's name; None for an entry without one.
        out: The artifact's folder, relative to the folder of amoeba.toml.
        manifest: Path of `amoeba.json` in it; None without an artifact.
        provenance: Path of the provenance statement in it; None without one.
        log: Path of the log of the entry, relative to the folder of amoeba.toml.
        seconds: Time for this entry alone, without calibration, cost tables, cutting and waiting for other entries.
        formats: The formats that were written.
        dtype: The precision of the weights.
        error: Why it failed; None otherwise.
        latency: The latency of the artifact.
        quality: The quality of the artifact.
        plan: The plan of the artifact.
        reference: The full model in each precision; empty for a given plan or shape.
        frontier: All candidates of the search; None for a given plan or shape, and for a locked build.
        inputs: The inputs of the artifact.
        files: The files of the artifact.
    """

    name: str
    status: Status
    fingerprint: str = ""
    model: str = ""
    target: str | None = None
    out: str = ""
    manifest: str | None = None
    provenance: str | None = None
    log: str | None = None
    seconds: float = 0.0
    formats: tuple[str, ...] = ()
    dtype: str | None = None
    error: ErrorRecord | None = None
    latency: LatencyFigures | None = None
    quality: QualityFigures | None = None
    plan: PlanRecord | None = None
    reference: tuple[FullModelRecord, ...] = ()
    frontier: Frontier | None = None
    inputs: tuple[InputId, ...] = ()
    files: tuple[FileEntry, ...] = ()

    def __post_init__(self) -> None:
        if (self.status == "failed") != (self.error is not None):
            raise ValueError(f"entry '{self.name}': {self.status}, and error is {'' if self.error else 'not '}given")


@dataclass(frozen=True, slots=True, kw_only=True)
class BuildReport:
    """What came of a build.

    Attributes:
        config: The path of amoeba.toml, as in the command.
        started: Start of the build: UTC, ISO 8601.
        seconds: Time of the whole build.
        engine: `local` or `ray`.
        locked: Whether the plans come from amoeba.lock, without a search.
        tool: Versions of amoeba and of the packages that it used.
        entries: All entries, in the order of amoeba.toml.
        schema_version: Raised when a key changes its meaning.
    """

    config: str
    started: str
    seconds: float
    engine: str
    locked: bool
    tool: Mapping[str, str]
    entries: tuple[EntryOutcome, ...]
    schema_version: int = REPORT_SCHEMA

    @property
    def failed(self) -> tuple[EntryOutcome, ...]:
        """The entries that failed."""
        return tuple(entry for entry in self.entries if entry.status == "failed")

    @property
    def exit_code(self) -> int:
        """0, or that of the first entry that failed; 1, a bug, goes before all others."""
        codes = [entry.error.exit_code for entry in self.failed if entry.error]
        return 1 if 1 in codes else next(iter(codes), 0)

    def to_json(self) -> dict[str, Any]:
        """The JSON object, `schema_version` first."""
        data = dataclasses.asdict(self)
        return {"schema_version": data.pop("schema_version"), **data}

    def to_text(self) -> str:
        """The bytes of build-report.json."""
        return json.dumps(self.to_json(), indent=1, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, data: Mapping[str, Any], *, where: str | Path | None = None) -> BuildReport:
        """Read what `to_json` wrote.

        Raises:
            InputError: It is of another version.
            DamagedFile: It is something else.
        """
        next_step = "Run 'amoeba build' again."
        check_schema(data, REPORT_SCHEMA, what="build report", where=where, next_step=next_step)
        try:
            return decode(cls, data)
        except ValueError as error:
            raise DamagedFile(where or REPORT_NAME, f"it is not a build report ({error})") from error


def read_report(path: Path) -> BuildReport:
    """The report in a file, or in a folder's build-report.json. Raises `NotFound`, `DamagedFile`, `InputError`."""
    file = path / REPORT_NAME if path.is_dir() else path
    data = read_json_object(file, what="The build report", missing="'amoeba build' writes one.")
    return BuildReport.from_json(data, where=file)
