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
    """What the model is asked to do; latencies are measured with it."""

    prompt_tokens: Count = Field(default=128, description="Tokens of the prompt; decode is timed after them.")
    generate_tokens: Count = Field(default=128, description="Tokens to generate; e2e counts them.")
    batch: Count = Field(default=1, description="Sequences at once.")


class Shared(Table):
    """Keys that `[defaults]` gives to every entry, and that an entry may set for itself."""

    target: str | None = Field(
        default=None, description="The device and its flow: a name ('amoeba targets') or a TOML file."
    )
    metric: Metric | None = Field(default=None, description="What a latency limits. Left out: as the target says.")
    percentile: Literal[50, 90] = Field(default=50, description="Of the measured times.")
    memory: str | None = Field(default=None, description="Most that the model may occupy, such as 900MB.")
    policy: Policy = Field(default="uniform", description="Layers all keep the same counts, or each its own.")
    formats: Annotated[tuple[Container, ...], Field(min_length=1)] | None = Field(
        default=None, description="Containers to write. Left out: what the target's file says."
    )
    dtype: Literal[DtypeName, "auto"] | None = Field(
        default=None, description="Precision of the weights. Left out: auto, the best of those that the target names."
    )
    adapters: tuple[str, ...] = Field(default=(), description="LoRA or SMoL adapters to merge in, in order.")
    strategy: str | None = Field(default=None, description="A strategy file. Left out: calibrated with the recipe.")
    recipe: str = Field(default="quick", description="The calibration recipe: a name or a TOML file.")
    seed: int = Field(default=0, description="Of the calibration.")
    refit: str | None = Field(
        default=None, description="How what stays is fitted: off, fast, full, or the refit file of the plan."
    )
    heal: str | None = Field(default=None, description="A distillation after it, such as 20m, 2Mtok or off.")
    calibration_data: tuple[str, ...] = Field(default=(), description="Texts of your own domain to fit on.")
    quality_floor: float | None = Field(
        default=None, description="Worst accepted value of the calibrated metric: highest loss, lowest accuracy."
    )
    require_measured: bool = Field(default=False, description="Refuse a target whose latency is only estimated.")
    workload: WorkloadTable | None = Field(default=None, description="Instead of [workload], as a whole.")


class BuildEntry(Shared):
    """One artifact. Exactly one of latency, throughput, shape and plan says how small it is."""

    name: Name = Field(description="Unique. The artifact's folder below 'out', unless the entry has an 'out'.")
    latency: str | None = Field(default=None, description="The budget: 50ms, 0.05s, or 80% of the full model.")
    throughput: str | None = Field(default=None, description="A decode speed, such as 30tok/s over the whole batch.")
    shape: str | None = Field(default=None, description="No search: DEPTHxWIDTH, such as 24x0.75.")
    plan: str | None = Field(default=None, description="No search: the plan.json of an earlier artifact.")
    out: str | None = Field(default=None, description="The artifact's folder, relative to this file.")


class BuildFile(Table):
    """A whole `amoeba.toml`."""

    out: str = Field(default="dist", description="Where artifacts, logs and reports go, relative to this file.")
    model: ModelTable | None = Field(default=None, description="The supernet. Left out: demo.")
    workload: WorkloadTable = Field(default=WorkloadTable(), description="What the model is asked to do.")
    defaults: Shared = Field(default=Shared(), description="What an entry has unless it says otherwise.")
    build: tuple[BuildEntry, ...] = Field(default=(), description="The artifacts.")


def json_schema() -> dict[str, Any]:
    """The JSON schema of amoeba.toml, as docs/amoeba.schema.json publishes it."""
    schema = BuildFile.model_json_schema()
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "amoeba.toml", **schema}
