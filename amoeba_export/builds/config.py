"""The keys of `amoeba.toml`. Editors complete them from the JSON schema that is made from these models."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from amoeba_export.backends.targets import Container
from amoeba_export.ir import Metric, Policy
from amoeba_export.ir.dtype import DtypeName

SCHEMA_URL = "https://raw.githubusercontent.com/amoeba-export/amoeba/main/docs/amoeba.schema.json"

Count = Annotated[int, Field(ge=1)]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=100)]


class Table(BaseModel):
    """A table in which a key that we do not know is a mistake."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class ModelTable(Table):
    """The supernet: one of both keys."""

    path: str | None = Field(default=None, description="A model folder or a GGUF file, relative to this file.")
    id: str | None = Field(default=None, description="A model on the Hugging Face hub, such as org/name, or demo.")


class WorkloadTable(Table):
    """The workload that latencies are measured with."""

    prompt_tokens: Count = Field(default=128, description="Number of prompt tokens; decode is timed after them.")
    generate_tokens: Count = Field(default=128, description="Number of tokens to generate; e2e includes them.")
    batch: Count = Field(default=1, description="Number of sequences in a batch.")


class Shared(Table):
    """Keys that `[defaults]` gives to every entry, and that an entry may set for itself."""

    target: str | None = Field(
        default=None, description="The device and its flow: a name ('amoeba targets') or a TOML file."
    )
    metric: Metric | None = Field(
        default=None, description="The latency that a budget limits. Default: the target's metric."
    )
    percentile: Literal[50, 90] = Field(default=50, description="Percentile of the measured times.")
    memory: str | None = Field(default=None, description="Memory limit of the model, such as 900MB.")
    policy: Policy = Field(
        default="uniform", description="All layers keep the same number of heads and neurons, or each its own."
    )
    formats: Annotated[tuple[Container, ...], Field(min_length=1)] | None = Field(
        default=None, description="Formats to write. Default: the target's formats."
    )
    dtype: Literal[DtypeName, "auto"] | None = Field(
        default=None, description="Precision of the weights. Default: auto, the best of the target's precisions."
    )
    adapters: tuple[str, ...] = Field(default=(), description="LoRA or SMoL adapters to merge; the order counts.")
    strategy: str | None = Field(default=None, description="A strategy file. Default: calibrate with the recipe.")
    recipe: str = Field(default="quick", description="The calibration recipe: a name or a TOML file.")
    seed: int = Field(default=0, description="Seed of the calibration.")
    refit: str | None = Field(
        default=None, description="How to fit the remaining weights: off, fast, full, or the refit file of the plan."
    )
    heal: str | None = Field(default=None, description="Distillation after the refit, such as 20m, 2Mtok or off.")
    calibration_data: tuple[str, ...] = Field(
        default=(), description="Texts from your domain for the refit and for rounding."
    )
    vocab_keep: str | None = Field(
        default=None,
        description="Compute the logits of some tokens only: a number, such as '8192', a text, or a JSON list of ids.",
    )
    quality_floor: float | None = Field(
        default=None, description="Worst accepted value of the calibrated metric: highest loss, lowest accuracy."
    )
    require_measured: bool = Field(default=False, description="Refuse a target whose latency is only estimated.")
    workload: WorkloadTable | None = Field(default=None, description="Replaces the whole table [workload].")


class BuildEntry(Shared):
    """One artifact. Exactly one of latency, throughput, shape and plan says how small it is."""

    name: Name = Field(
        description="A unique name. Also the artifact's folder in 'out', unless the entry has its own 'out'."
    )
    latency: str | None = Field(default=None, description="The budget: 50ms, 0.05s, or 80% of the full model.")
    throughput: str | None = Field(default=None, description="A decode speed, such as 30tok/s over the whole batch.")
    shape: str | None = Field(default=None, description="This shape, DEPTHxWIDTH, such as 24x0.75. No search.")
    plan: str | None = Field(default=None, description="This plan, the plan.json of an earlier artifact. No search.")
    out: str | None = Field(default=None, description="The artifact's folder, relative to this file.")


class BuildFile(Table):
    """A whole `amoeba.toml`."""

    out: str = Field(default="dist", description="Folder of artifacts, logs and reports, relative to this file.")
    model: ModelTable | None = Field(default=None, description="The supernet. Default: demo.")
    workload: WorkloadTable = Field(
        default=WorkloadTable(), description="The workload that latencies are measured with."
    )
    defaults: Shared = Field(default=Shared(), description="Keys that hold for every entry that does not set them.")
    build: tuple[BuildEntry, ...] = Field(default=(), description="The artifacts.")


def json_schema() -> dict[str, Any]:
    """The JSON schema of amoeba.toml, as docs/amoeba.schema.json publishes it."""
    schema = BuildFile.model_json_schema()
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "amoeba.toml", **schema}
