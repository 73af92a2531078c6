"""The samples of a calibration, drawn once: those of the search, those of widths, and those that are held out."""

from __future__ import annotations

import importlib.metadata
import json
from dataclasses import dataclass
from pathlib import Path

from amoeba_export.calibrate.recipe import Recipe
from amoeba_export.model.samples import Samples, read_samples


@dataclass(frozen=True, slots=True, kw_only=True)
class Drawn:
    """What a recipe and a seed gave.

    Attributes:
        search: What sets of layers are compared on.
        width: What importance is measured on; by default the same.
        heldout: What the quality of shapes is measured on.
    """

    recipe: Recipe
    seed: int
    search: Samples
    width: Samples
    heldout: Samples

    @property
    def summary(self) -> str:
        """What is drawn, in words."""
        return (
            f"recipe '{self.recipe.name}', seed {self.seed}: {self.search.num_samples} samples"
            f" ({self.search.num_tokens} tokens) for the search, {self.heldout.num_samples}"
            f" ({self.heldout.num_tokens}) held out"
        )

    @property
    def provenance(self) -> dict[str, str]:
        """What is needed to repeat it."""
        return {
            "recipe": self.recipe.name,
            "settings": json.dumps(self.recipe.facts(), sort_keys=True),
            "seed": str(self.seed),
            "search_samples_sha256": self.search.digest,
            "heldout_samples_sha256": self.heldout.digest,
            "width_samples_sha256": self.width.digest,
        } | {package: importlib.metadata.version(package) for package in ("amoeba-export", "torch", "transformers")}


def draw(recipe: Recipe, folder: Path, *, seed: int) -> Drawn:
    """Draw the samples of `recipe`, with the tokenizer in a model's `folder`. Raises `InputError`."""
    search, heldout = read_samples(recipe.data, folder, seed=seed)
    width = search if recipe.width.data is None else read_samples(recipe.width.data, folder, seed=seed)[0]
    return Drawn(recipe=recipe, seed=seed, search=search, width=width, heldout=heldout)
