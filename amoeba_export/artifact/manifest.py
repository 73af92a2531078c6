"""`amoeba.json`: what an artifact is, where it came from, how fast and how exact it was seen to be.

Everything but the measurements (`latency`, `verification`) is a function of the inputs: same inputs, same bytes.
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
from amoeba_export.errors import DamagedFile, InputError, NotFound
from amoeba_export.ir import Architecture, InputId, Metric, Shape, Source, SubnetPlan, Workload

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
class Manifest:
    """The content of `amoeba.json`.

    Attributes:
        model: What the user called the supernet.
        dtype: `fp32`, `int4`, ...
        quality: The calibrated metric of this shape, such as `{"loss": 3.2}`; None without a calibrated grid.
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
    schema_version: int = MANIFEST_SCHEMA

    def architecture(self) -> Architecture:
        """The supernet's dims."""
        return Architecture(**self.dims)

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
        try:
            version = data["schema_version"]
            if version != MANIFEST_SCHEMA:
                raise InputError(
                    f"This manifest has schema version {version}; this amoeba reads {MANIFEST_SCHEMA}.",
                    where=where,
                    next_step="Use the amoeba that wrote the artifact, or export it again.",
                )
            shape, latency, verification = data["shape"], data["latency"], data["verification"]
            layers = tuple(LayerCounts(**layer) for layer in shape["layers"])
            return cls(
                model=data["model"],
                shape=ShapeRecord(depth=shape["depth"], width=shape["width"], layers=layers),
                dtype=data["dtype"],
                latency=latency and LatencyRecord(**{**latency, "workload": Workload(**latency["workload"])}),
                quality=data["quality"],
                verification=verification and VerificationRecord(**verification),
                inputs=tuple(InputId(**item) for item in data["inputs"]),
                files=tuple(FileEntry(**item) for item in data["files"]),
                tool=data["tool"],
                dims=data["dims"],
            )
        except (KeyError, TypeError) as error:
            raise DamagedFile(
                where or MANIFEST_NAME, f"it is not a manifest ({type(error).__name__}: {error})"
            ) from error


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
    if not path.is_file():
        raise NotFound("The artifact's manifest", path, next_step="Give a folder that 'amoeba export' wrote.")
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DamagedFile(path, f"it is not JSON ({error})") from error
    if not isinstance(data, dict):
        raise DamagedFile(path, "it is not a JSON object")
    return Manifest.from_json(data, where=path)
