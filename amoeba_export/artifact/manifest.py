"""`amoeba.json`: what an artifact is, where it came from, how fast and how exact it was seen to be.

Everything but what was measured (`latency`, `verification`, `continuations`) is a function of the inputs: same inputs,
same bytes.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from amoeba_export.artifact.checksums import FileEntry
from amoeba_export.artifact.provenance import provenance_text
from amoeba_export.errors import DamagedFile
from amoeba_export.ir import Architecture, InputId, Metric, RoundingHow, Shape, Source, SubnetPlan, Workload
from amoeba_export.reading import check_schema, decode, dim_problems, read_json_object

MANIFEST_NAME = "amoeba.json"
PLAN_NAME = "plan.json"
MANIFEST_SCHEMA = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerCounts:
    """How much one kept layer keeps: counts. `plan.json` has the indices."""

    source_layer: int
    query_heads: int
    kv_heads: int
    ffn: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ShapeRecord:
    """The shape that was built."""

    depth: int
    width: float
    layers: tuple[LayerCounts, ...]

    @classmethod
    def of(cls, plan: SubnetPlan) -> ShapeRecord:
        """The counts of `plan`."""
        return cls(
            depth=plan.shape.depth,
            width=plan.shape.width,
            layers=tuple(
                LayerCounts(
                    source_layer=layer.source_layer,
                    query_heads=len(layer.query_heads),
                    kv_heads=len(layer.kv_heads),
                    ffn=len(layer.ffn),
                )
                for layer in plan.layers
            ),
        )

    @property
    def shape(self) -> Shape:
        """Depth and width alone."""
        return Shape(self.depth, self.width)


@dataclass(frozen=True, slots=True, kw_only=True)
class LatencyRecord:
    """The budget, what the cost model promised, and what the target said of the files in this artifact.

    Attributes:
        percentile: Which percentile the budget holds for.
        budget_ms: None when the shape was given without a budget.
        predicted_ms: None when nothing was predicted.
        measured_ms: `p50` and `p90` of `metric` in milliseconds, or None when the figures are an estimate.
        source: `measured`, or how the estimate came about.
        target: The target's name.
        uncertainty: Relative half-width of the prediction.
        full_dtype: Precision of the full model that a budget as a share of it refers to; None without a search.
        device: What the backend says of the device that was measured.
    """

    metric: Metric
    percentile: int = 50
    budget_ms: float | None
    predicted_ms: float | None
    measured_ms: Mapping[str, float] | None
    source: Source
    target: str
    workload: Workload
    uncertainty: float | None = None
    full_dtype: str | None = None
    device: Mapping[str, str] = field(default_factory=dict)

    @property
    def is_estimate(self) -> bool:
        """Whether the target itself was never asked."""
        return self.source != "measured"

    @property
    def actual_ms(self) -> float | None:
        """What counts against the budget: the measured percentile, or the estimate where there is none."""
        return self.measured_ms[f"p{self.percentile}"] if self.measured_ms else self.predicted_ms


@dataclass(frozen=True, slots=True, kw_only=True)
class FullModelRecord:
    """What the uncut model would give in one precision: what the artifact is to be compared with.

    Attributes:
        latency_ms: The metric and percentile of the artifact's `latency`.
        source: Whether `latency_ms` was measured (on a graph of its dims), or how the estimate came about.
        quality: The metric of the artifact's `quality`, rounding included; None where it is not known.
        keeps_budget: Whether it would keep every budget; None without one.
        rounding: Whether `quality` is that of integers chosen with data, where the precision has such; else None.
    """

    dtype: str
    latency_ms: float
    source: Source
    quality: Mapping[str, float] | None = None
    keeps_budget: bool | None = None
    rounding: RoundingHow | None = None

    @property
    def rounding_words(self) -> str:
        """How it was rounded, where there are two ways; else empty."""
        return {"data": "rounded with data", "nearest": "rounded to nearest", None: ""}[self.rounding]


@dataclass(frozen=True, slots=True, kw_only=True)
class VerificationRecord:
    """The files, re-opened from disk, against the masked supernet: the worst of all formats.

    Attributes:
        mean_kl: KL divergence of quantized formats from the same shape unquantized, in nats per token. None, and not
            in the JSON, if nothing is quantized.
        perplexity_ratio: How many times the perplexity of that shape they have, likewise.
    """

    max_abs_diff: float
    max_rel_diff: float
    greedy_tokens_equal: bool
    mean_kl: float | None = None
    perplexity_ratio: float | None = None

    def to_json(self) -> dict[str, float | bool]:
        """The figures that there are."""
        return {key: value for key, value in dataclasses.asdict(self).items() if value is not None}


@dataclass(frozen=True, slots=True, kw_only=True)
class ContinuationRecord:
    """How the files of one format go on after a text, so that another runtime can be asked the same.

    Attributes:
        prompt: Tokens of the text.
        tokens: Those that come next, each the likeliest after the ones before it, decoded through the KV cache.
    """

    format: str
    prompt: tuple[int, ...]
    tokens: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class RefitRecord:
    """How the weights were fitted after the cut.

    Attributes:
        kind: `refit` by least squares, `heal` by distillation from there.
        sha256: Of the file with the fitted weights.
        losses: Text -> `full`, `cut` (before it was fitted) and `refit`: nats per token on tokens that nothing was
            fitted on. `mix` is of the texts that were fitted, the others are from other sources.
    """

    kind: str
    sha256: str
    losses: Mapping[str, Mapping[str, float]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """The content of `amoeba.json`.

    Attributes:
        model: What the user called the supernet.
        dtype: `fp32`, `int4`, ...
        quality: The calibrated metric of this shape, such as `{"loss": 3.2}`, with what rounding adds where precisions
            were weighed; of the whole model, measured on a text where nothing was calibrated. None if it is not known.
        reference: The uncut model in each precision, that of relative budgets first; empty without a search.
        refit: How the weights were fitted after the cut. None, and not in the JSON, where they were not.
        continuations: What each format answered when it was verified. Empty, and not in the JSON, where none was asked.
        files: Every file but the manifest, sorted by path.
        tool: Versions of amoeba and of what it computed with.
        dims: Of the supernet, all but its `config`: with the plan, they are the dims of what is in the artifact.
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
        for name in ("refit", "continuations"):
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
