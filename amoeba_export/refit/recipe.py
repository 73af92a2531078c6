"""Refit recipes: how many tokens of which texts, and which strengths are tried. TOML; `calibration/refit/` has two."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from amoeba_export.model.data import DataRecipe
from amoeba_export.model.recipes import located, read_recipe, shipped

KIND = "refit"

OFF = "off"
"""Instead of a recipe: weights stay as they were cut."""

SHORTLIST_RECIPE = "fast"
"""Of the refits by which a search compares shapes."""

HEAL_RECIPE = "heal"
"""The texts of a distillation."""

HEALED_UP_TO = 500_000_000
"""Parameters of a model whose cuts are healed without being asked. The full model, the cut and its optimizer take some
20 bytes a parameter."""


class _Table(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Share(DataRecipe):
    """One text of a mix. Of the settings of `data` it uses where it lies and which fields make a document.

    Attributes:
        share: Share of the tokens. The sum need not be 1.
    """

    share: Annotated[float, Field(gt=0)] = 1.0


class RefitRecipe(_Table):
    """One recipe.

    Attributes:
        name: File name without `.toml`.
        tokens: Number of tokens for the fit.
        judge_tokens: Number of held-out tokens of the same texts, to choose the strength for each matrix.
        other_tokens: Number of tokens of each text in `other`, for the reported losses only.
        window: Tokens in a sample.
        batch: Samples in one forward pass.
        strengths: Strengths of the ridge to try, relative to the mean diagonal of the Gram matrix.
        heal_tokens: Number of tokens of the heal after the fit. `--heal` overrides it. A model of more than 500 million
            parameters is healed only with `--heal`.
        mix: Texts for the fit. Their `window`, `scored`, `samples`, `heldout` and `batch` have no effect.
        other: Texts for the reported losses, with the same keys as `mix`.
    """

    name: str
    description: str = ""
    tokens: Annotated[int, Field(ge=256)] = 32768
    judge_tokens: Annotated[int, Field(ge=256)] = 4096
    other_tokens: Annotated[int, Field(ge=256)] = 4096
    window: Annotated[int, Field(ge=2)] = 256
    batch: Annotated[int, Field(ge=1)] = 8
    strengths: tuple[Annotated[float, Field(gt=0)], ...] = (1e-2, 1e-1, 5e-1)
    heal_tokens: Annotated[int, Field(ge=0)] = 0
    mix: tuple[Share, ...]
    other: tuple[Share, ...]

    def with_texts(self, files: Sequence[Path]) -> RefitRecipe:
        """The same with texts of the user's own domain: they get half of the tokens, in equal parts.

        A `.jsonl` file has documents in its field `text`.
        """
        if not files:
            return self
        total = sum(share.share for share in self.mix)
        own = tuple(Share(file=str(path.resolve()), share=total / len(files)) for path in files)
        return self.model_copy(update={"mix": (*self.mix, *own)})

    @property
    def identity(self) -> str:
        """sha256 of every setting and data file that decides the result."""
        digest = hashlib.sha256(json.dumps(self.facts(), sort_keys=True).encode())
        for data in (*self.mix, *self.other):
            if data.file is not None and Path(data.file).is_file():
                digest.update(hashlib.sha256(Path(data.file).read_bytes()).digest())
        return digest.hexdigest()

    def facts(self) -> dict[str, Any]:
        """Every setting that decides the result. Not where files lie, nor what only costs memory."""
        facts = self.model_dump(mode="json", exclude={"name", "description", "batch"})
        for data in (*facts["mix"], *facts["other"]):
            data["file"] = data["file"] and Path(data["file"]).name
        return facts


@dataclass(frozen=True, slots=True, kw_only=True)
class Draw:
    """Which samples a run takes of which texts: those of a recipe, by a seed."""

    recipe: RefitRecipe
    seed: int = 0

    @property
    def facts(self) -> dict[str, Any]:
        """What a result is looked up by."""
        return {"recipe": self.recipe.identity, "seed": self.seed}

    @property
    def settings(self) -> dict[str, Any]:
        """What a file says that it was made with."""
        return {"recipe": self.recipe.name, **self.recipe.facts(), "seed": self.seed}


@dataclass(frozen=True, slots=True, kw_only=True)
class HealSettings:
    """How long and how.

    Attributes:
        tokens: Tokens to train on; the texts are gone through again when they are shorter.
        seconds: Ends it earlier. The learning rate falls with whichever runs out first.
        learning_rate: The highest, of AdamW, for weights; it falls with a cosine to a tenth.
        rows: Samples a step.
        rank: Of the changes that are trained instead of weights; None: the size of the cut decides, see `heal`.
    """

    tokens: int = 2_000_000
    seconds: float | None = None
    learning_rate: float = 2e-4
    rows: int = 4
    rank: int | None = None


def shipped_refits() -> tuple[str, ...]:
    """Names of the recipes in `calibration/refit/`."""
    return shipped(KIND)


def load_refit_recipe(name_or_path: str | Path) -> RefitRecipe:
    """Read a shipped recipe by name, or a TOML file by path. Raises as `read_recipe`."""
    recipe, path = read_recipe(RefitRecipe, name_or_path, kind=KIND)
    return recipe.model_copy(
        update={
            "mix": tuple(located(share, path) for share in recipe.mix),
            "other": tuple(located(share, path) for share in recipe.other),
        }
    )
