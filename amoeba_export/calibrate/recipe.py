"""Calibration recipes: what Stage 1 measures, on what, and how hard it tries. TOML files; `calibration/` has some."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from amoeba_export.ir.derive import Unit
from amoeba_export.ir.metric import ObjectiveName
from amoeba_export.ir.plan import Policy
from amoeba_export.model.data import DataRecipe
from amoeba_export.model.recipes import located, read_recipe, shipped
from amoeba_export.reading.bounds import MAX_SIZES

WidthMetric = Literal["WIFV", "WIFN", "IFV", "wanda"]


class _Table(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class DepthRecipe(_Table):
    """The search for layers.

    Attributes:
        metric: The metric of a set of layers. `accuracy` is that of multiple choice.
        max_removed: Most layers to remove: a whole number, or a share of all layers if below 1.
        keep_last: Layers at the end that always stay.
        beam: Choices kept per cell; 1 is the paper's algorithm. More than 1 needs the mode `exact`.
        mode: `exact` compares on all samples; `racing` stops a comparison when it is decided at `confidence`.
        confidence: Confidence level of one comparison with `racing`.
    """

    metric: ObjectiveName = "loss"
    max_removed: Annotated[float, Field(gt=0, le=MAX_SIZES["num_layers"])] = 0.4
    keep_last: Annotated[int, Field(ge=0)] = 1
    beam: Annotated[int, Field(ge=1)] = 1
    mode: Literal["exact", "racing"] = "exact"
    confidence: Annotated[float, Field(gt=0.5, lt=1)] = 0.95

    @field_validator("max_removed")
    @classmethod
    def _share_or_number(cls, value: float) -> float:
        if value > 1 and value != int(value):
            raise ValueError("give a whole number of layers, or a share of them below 1")
        return value

    @model_validator(mode="after")
    def _one_beam(self) -> DepthRecipe:
        if self.mode == "racing" and self.beam > 1:
            raise ValueError("racing keeps one choice per cell; leave 'beam' out, or use mode 'exact'")
        return self

    def removed_of(self, num_layers: int) -> int:
        """`max_removed` for a model of `num_layers`."""
        if self.max_removed >= 1:
            return int(self.max_removed)
        return max(1, min(int(self.max_removed * num_layers), num_layers - max(1, self.keep_last)))


class WidthRecipe(_Table):
    """The importance of heads and neurons.

    Attributes:
        metric: The formula of the score. `wanda` has no compensation biases.
        data: The data set for it. Default: the search samples.
    """

    metric: WidthMetric = "WIFV"
    data: DataRecipe | None = None


class QualityRecipe(_Table):
    """The grid of shapes whose quality is measured on the held-out samples.

    Attributes:
        metric: The metric of a shape.
        depth_step: Step between the measured depths, in layers. The deepest cut is always measured.
        widths: The measured widths.
        policy: `uniform`: the same counts in all layers. `adaptive`: all layers share one threshold.
        unit: A cut of attention removes KV heads with their query heads (`kv_group`), or one query head of every KV
            head (`query_per_group`).
        align: Numbers of neurons are multiples of this.
    """

    metric: ObjectiveName = "loss"
    depth_step: Annotated[int, Field(ge=1)] = 1
    widths: tuple[Annotated[float, Field(gt=0, le=1)], ...] = (1.0, 0.875, 0.75, 0.625, 0.5)
    policy: Policy = "uniform"
    unit: Unit = "kv_group"
    align: Annotated[int, Field(ge=1)] = 1


class Recipe(_Table):
    """One recipe.

    Attributes:
        name: File name without `.toml`.
        description: One line for messages.
        memory_mb: Most memory for weights and states, in MiB. If all layers fit in half of it in fp32, they stay in
            memory. If not, each is read when it is needed.
        states_mb: Most disk space for the hidden states of the search samples, in MiB. If they need more, some are
            computed again.
    """

    name: str
    description: str = ""
    memory_mb: Annotated[int, Field(ge=64)] = 2048
    states_mb: Annotated[int, Field(ge=1)] = 4096
    data: DataRecipe
    depth: DepthRecipe = DepthRecipe()
    width: WidthRecipe = WidthRecipe()
    quality: QualityRecipe = QualityRecipe()

    @model_validator(mode="after")
    def _accuracy_of_choices(self) -> Recipe:
        for table in ("depth", "quality"):
            if getattr(self, table).metric == "accuracy" and self.data.kind != "choices":
                raise ValueError(f"{table}.metric = 'accuracy' needs data.kind = 'choices'")
        if self.data.heldout < 1:
            raise ValueError("data.heldout must be at least 1: quality is measured there")
        return self

    @property
    def identity(self) -> str:
        """sha256 of every setting and data file that decides the result."""
        digest = hashlib.sha256(json.dumps(self.facts(), sort_keys=True).encode())
        for data in (self.data, self.width.data):
            if data is not None and data.file is not None and Path(data.file).is_file():
                digest.update(hashlib.sha256(Path(data.file).read_bytes()).digest())
        return digest.hexdigest()

    def facts(self) -> dict[str, Any]:
        """Every setting that decides the result. Not where files lie, nor what only costs time or memory."""
        facts = self.model_dump(mode="json", exclude={"name", "description", "memory_mb", "states_mb"})
        for data in (facts["data"], facts["width"]["data"]):
            if data is not None:
                del data["file"]
        return facts


def shipped_recipes() -> tuple[str, ...]:
    """Names of the recipes in `calibration/`."""
    return shipped(".")


def load_recipe(name_or_path: str | Path) -> Recipe:
    """Read a shipped recipe by name, or a TOML file by path. Raises as `read_recipe`."""
    recipe, path = read_recipe(Recipe, name_or_path, kind=".")
    width_data = recipe.width.data and located(recipe.width.data, path)
    width = recipe.width.model_copy(update={"data": width_data})
    return recipe.model_copy(update={"data": located(recipe.data, path), "width": width})
