"""`amoeba.json`: what an artifact is, where it came from, how fast and how exact it was seen to be.

Everything but what was measured (`latency`, `verification`, `continuations`) is a function of the inputs: same inputs,
same bytes.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from amoeba_export.artifact.checksums import FileEntry
from amoeba_export.artifact.provenance import provenance_text
from amoeba_export.artifact.records import (
    ContinuationRecord,
    FullModelRecord,
    LatencyRecord,
    RefitRecord,
    ShapeRecord,
    VerificationRecord,
    VocabularyRecord,
)
from amoeba_export.errors import DamagedFile
from amoeba_export.ir import Architecture, InputId
from amoeba_export.reading import check_schema, decode, dim_problems, read_json_object

MANIFEST_NAME = "amoeba.json"
PLAN_NAME = "plan.json"
MANIFEST_SCHEMA = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """The content of `amoeba.json`.

    Attributes:
        model: The supernet, as in the command.
        shape: The shape that was built.
        dtype: The precision of the weights, such as `fp32` or `int4`.
        latency: The budget and the latency; None without a target.
        quality: The calibrated metric of this shape, such as `{"loss": 3.2}`. It includes the rise from rounding if the
            search compared precisions. For a whole model without a calibration, it is measured on a text. None if it is
            not known.
        verification: Distance of the files from the masked supernet; None if they were not compared.
        inputs: Model, strategy, adapters and other input files of the artifact.
        files: Every file except the manifest, sorted by path.
        tool: Versions of amoeba and of the packages that it used.
        dims: Dims of the supernet, without its `config`. With the plan, they give the dims of the artifact.
        reference: The uncut model in each precision. Relative budgets refer to the first one. Empty without a search.
        refit: How the weights were fitted after the cut. None, and not in the JSON, without a fit.
        vocabulary: The tokens that have logits. None, and not in the JSON, if all have.
        continuations: The next tokens of each format, from the verification. Empty, and not in the JSON, if not asked
            for.
        schema_version: Raised when a key changes its meaning.
    """

    model: str
    shape: ShapeRecord
    dtype: str
    latency: LatencyRecord | None
    quality: Mapping[str, float] | None
    verification: VerificationRecord | None
    inputs: tuple[InputId, ...]
    files: tuple[FileEntry, ...] = ()
    tool: Mapping[str, str]
    dims: Mapping[str, Any]
    reference: tuple[FullModelRecord, ...] = ()
    refit: RefitRecord | None = None
    vocabulary: VocabularyRecord | None = None
    continuations: tuple[ContinuationRecord, ...] = ()
    schema_version: int = MANIFEST_SCHEMA

    def architecture(self) -> Architecture:
        """The supernet's dims."""
        return Architecture.from_facts(self.dims)

    def with_files(self, files: Sequence[FileEntry]) -> Manifest:
        """A copy that lists `files`."""
        return dataclasses.replace(self, files=tuple(files))

    def provenance(self, files: Sequence[FileEntry]) -> str:
        """The bytes of `provenance.json` beside `files`. What was measured is not in it: same inputs, same bytes."""
        parameters = {
            "model": self.model,
            "target": self.latency.target if self.latency else None,
            "shape": str(self.shape.shape),
            "formats": list(dict.fromkeys(file.path.split("/")[0] for file in files if "/" in file.path)),
            "dtype": self.dtype,
        }
        return provenance_text(parameters, self.inputs, self.tool, files)

    def to_json(self) -> dict[str, Any]:
        """The JSON object, `schema_version` first."""
        data = dataclasses.asdict(self)
        data["verification"] = self.verification and self.verification.to_json()
        for name in ("refit", "vocabulary", "continuations"):
            if not data[name]:
                del data[name]
        return {"schema_version": data.pop("schema_version"), **data}

    def to_text(self) -> str:
        """The bytes of `amoeba.json`: JSON with each layer, input and file on a line of its own, for readable diffs."""
        data = self.to_json()
        shape, layers = data["shape"], data["shape"].pop("layers")
        lines = []
        for key, value in data.items():
            if value is shape:
                head = json.dumps(shape)[:-1]
                text = f'{head}, "layers": {_one_a_line(layers, "    ")}}}'
            elif isinstance(value, list | tuple):
                text = _one_a_line(value, "  ")
            else:
                text = json.dumps(value, indent=2, allow_nan=False).replace("\n", "\n  ")
            lines.append(f"  {json.dumps(key)}: {text}")
        return "{\n" + ",\n".join(lines) + "\n}\n"

    @classmethod
    def from_json(cls, data: Mapping[str, Any], *, where: Path | None = None) -> Manifest:
        """Read what `to_json` wrote. Raises `InputError` naming the first key that is wrong."""
        again = "Use the amoeba that wrote the artifact, or export it again."
        check_schema(data, MANIFEST_SCHEMA, what="manifest", where=where, next_step=again)
        try:
            manifest = decode(cls, data)
            problems = manifest._problems()
        except ValueError as error:
            raise DamagedFile(where or MANIFEST_NAME, f"it is not a manifest ({error})") from error
        if problems:
            raise DamagedFile(where or MANIFEST_NAME, f"it is not a manifest ({'; '.join(problems)})")
        return manifest

    def _problems(self) -> list[str]:
        """What does not fit together in a manifest that was read."""
        problems = dim_problems(self.dims)
        decode(Architecture, self.dims, "dims")
        if "amoeba" not in self.tool:
            problems.append("tool has no key 'amoeba'")
        if not self.shape.layers or len(self.shape.layers) != self.shape.depth:
            problems.append(f"its shape has a depth of {self.shape.depth} and {len(self.shape.layers)} layers")
        if (latency := self.latency) is not None:
            if latency.percentile not in (50, 90):
                problems.append(f"latency.percentile is {latency.percentile}")
            if latency.measured_ms is not None and not {"p50", "p90"} <= set(latency.measured_ms):
                problems.append("latency.measured_ms has no p50 or no p90")
            if latency.measured_ms is None and latency.predicted_ms is None:
                problems.append("its latency has no figure")
            if latency.budget_ms is not None and latency.budget_ms <= 0:
                problems.append(f"latency.budget_ms is {latency.budget_ms}")
        record = self.verification
        if record is not None and record.mean_kl is not None and record.perplexity_ratio is None:
            problems.append("verification has a mean_kl and no perplexity_ratio")
        return problems


def _one_a_line(items: Sequence[Any], indent: str) -> str:
    if not items:
        return "[]"
    lines = ",\n".join(f"{indent}  {json.dumps(item, allow_nan=False)}" for item in items)
    return f"[\n{lines}\n{indent}]"


def is_artifact(folder: Path) -> bool:
    """Whether `folder` was published by amoeba."""
    return (folder / MANIFEST_NAME).is_file()


def read_manifest(folder: Path) -> Manifest:
    """The manifest of an artifact. Raises `NotFound`, `DamagedFile`, `InputError`."""
    path = folder / MANIFEST_NAME
    missing = "Give a folder that 'amoeba export' wrote."
    return Manifest.from_json(read_json_object(path, what="The artifact's manifest", missing=missing), where=path)
