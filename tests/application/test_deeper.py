"""An automatic calibration that knows nothing small enough is deepened, once, if that can help."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from amoeba_export import ExportRequest
from amoeba_export.application import pipeline, selection
from amoeba_export.application.recipes import deepened
from amoeba_export.calibrate import Recipe, load_recipe
from amoeba_export.errors import NothingFits
from amoeba_export.ir import Shape, Strategy, Supernet
from tests.application.test_pipeline import write_target
from tests.listener import Listener
from tests.search.strategies import own_strategy


def test_a_deepened_recipe_goes_to_half_the_layers_and_a_third_of_the_width() -> None:
    quick = load_recipe("quick")
    deep = deepened(quick, 30)
    assert (quick.depth.removed_of(30), deep.depth.removed_of(30)) == (7, 15)
    assert deep.quality.widths == quick.quality.widths and min(quick.quality.widths) == 0.3
    assert deep.data == quick.data, "or what was scored would not be found again"
    assert deep.identity != quick.identity


def test_a_recipe_that_is_deeper_already_keeps_its_depth(tmp_path: Path) -> None:
    path = tmp_path / "deep.toml"
    path.write_text('[data]\nfile = "text.txt"\n[depth]\nmax_removed = 0.7\n[quality]\nwidths = [1.0, 0.2]\n')
    recipe = load_recipe(path)
    assert deepened(recipe, 10) == recipe


@pytest.fixture
def calibrated(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Recipe]:
    """Calibration as a rule: a layer costs 1, width costs 2. The recipes it was asked to follow, in order."""
    recipes: list[Recipe] = []

    def calibrate(supernet: Supernet, recipe: Recipe, **settings: Any) -> Strategy:
        recipes.append(recipe)
        num_layers = supernet.architecture.num_layers
        depths = range(num_layers, num_layers - recipe.depth.removed_of(num_layers) - 1, -1)
        quality = {Shape(d, w): 10 - d - 2 * w for d in depths for w in recipe.quality.widths}
        made = own_strategy(supernet.architecture, depths=depths, widths=recipe.quality.widths, quality=quality)
        return dataclasses.replace(made, model_id=supernet.identity)

    monkeypatch.setattr(selection, "calibrate", calibrate)
    monkeypatch.setenv("AMOEBA_CACHE", str(tmp_path / "cache"))
    return recipes


@pytest.fixture
def search(
    tiny_dirs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, calibrated: list[Recipe]
) -> Callable[[str], tuple[Shape, Listener]]:
    """Search under a share of the full model, without a strategy. 3x0.5 takes 0.54 of it, 2x0.3 takes 0.36."""
    from amoeba_export import backends

    monkeypatch.setattr(backends, "BACKENDS", {**backends.BACKENDS, "imaginary": "tests.imaginary:BACKEND"})
    target, listener = write_target(tmp_path), Listener()

    def run(latency: str) -> tuple[Shape, Listener]:
        request = ExportRequest(model=str(tiny_dirs["llama"]), target=str(target), latency=latency)
        return pipeline.search(request, progress=listener).plan.shape, listener

    return run


def test_where_the_quick_calibration_is_enough_it_stays(
    search: Callable[[str], tuple[Shape, Listener]], calibrated: list[Recipe]
) -> None:
    shape, _ = search("70%")
    assert shape.depth >= 3
    assert len(calibrated) == 1


def test_what_only_a_deeper_one_knows_is_found(
    search: Callable[[str], tuple[Shape, Listener]], calibrated: list[Recipe]
) -> None:
    shape, listener = search("45%")
    assert shape.depth == 2 or shape.width < 0.5
    assert [recipe.depth.removed_of(4) for recipe in calibrated] == [1, 2]
    assert "No calibrated shape fits: calibrating deeper and narrower." in listener.notes


def test_what_no_subnet_keeps_is_not_calibrated_for(
    search: Callable[[str], tuple[Shape, Listener]], calibrated: list[Recipe]
) -> None:
    with pytest.raises(NothingFits):
        search("10%")
    assert len(calibrated) == 1
