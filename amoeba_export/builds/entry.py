"""One `[[build]]` entry, resolved, and the units of work that a build is made of. Torch-free, and they pickle."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from amoeba_export.application.request import ExportRequest
from amoeba_export.artifact import FullModelRecord
from amoeba_export.builds.outcome import EntryOutcome
from amoeba_export.ir import InputId, SubnetPlan


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """An entry with everything inherited and every path absolute.

    Attributes:
        name: Unique in its file.
        request: What `amoeba export` would be asked.
        quality_floor: Worst accepted value of the calibrated metric of the strategy; None accepts all.
        line: Where the entry begins in amoeba.toml.
    """

    name: str
    request: ExportRequest
    quality_floor: float | None = None
    line: int = 0

    @property
    def out(self) -> Path:
        """The artifact's folder."""
        assert self.request.out is not None, "config resolves it"
        return self.request.out


@dataclass(frozen=True, slots=True, kw_only=True)
class LockedEntry:
    """What amoeba.lock remembers of one entry.

    Attributes:
        plan: Every kept head and neuron.
        inputs: What it was made from, by content.
        latency: The manifest's record, or None without a target.
        quality: The manifest's record.
        reference: The manifest's records of the full model.
        files: Relative path -> sha256 of every file of the artifact that a rebuild gives again.
    """

    name: str
    fingerprint: str
    target: str | None
    dtype: str
    plan: SubnetPlan
    inputs: tuple[InputId, ...]
    latency: Mapping[str, Any] | None = None
    quality: Mapping[str, float] | None = None
    reference: tuple[FullModelRecord, ...] = ()
    files: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class CalibrationTask:
    """One calibration that entries share. `request` names the model, the recipe and the seed."""

    key: str
    request: ExportRequest


@dataclass(frozen=True, slots=True, kw_only=True)
class CostTableTask:
    """One cost table that entries share, to be measured on the target of `request`.

    Attributes:
        target: The target's name: the resource that the task needs.
        after: Key of the calibration that it needs, or None.
    """

    key: str
    target: str
    request: ExportRequest
    after: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class EntryTask:
    """One artifact to build.

    Attributes:
        fingerprint: Content address of what the artifact is made from. An artifact with it need not be built again.
        target: The target's name where the entry measures on it: the resource that the task needs; else None.
        base: Folder of amoeba.toml; paths in the outcome are relative to it.
        log: The file that gets what is said.
        locked: The plan and figures to rebuild, or None to search.
        after: Keys of the calibration and cost table that it needs.
    """

    entry: Entry
    fingerprint: str
    inputs: tuple[InputId, ...]
    target: str | None
    base: Path
    log: Path
    locked: LockedEntry | None = None
    after: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class EntryResult:
    """What an engine gives back for an `EntryTask`. `locked` is None when the entry failed."""

    outcome: EntryOutcome
    locked: LockedEntry | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class BuildWork:
    """All that has to be done, shared work first. Everything that is up to date is left out."""

    calibrations: tuple[CalibrationTask, ...]
    cost_tables: tuple[CostTableTask, ...]
    entries: tuple[EntryTask, ...]
