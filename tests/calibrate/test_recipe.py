from __future__ import annotations

from pathlib import Path

import pytest

from amoeba_export.calibrate import load_recipe, shipped_recipes
from amoeba_export.calibrate.recipe import DepthRecipe
from amoeba_export.errors import InputError, NotFound, UnknownName


def test_shipped_recipes_read_and_their_data_is_there() -> None:
    assert shipped_recipes() == ("default", "paper", "quick")
    for name in shipped_recipes():
        recipe = load_recipe(name)
        assert recipe.name == name
        for data in (recipe.data, recipe.width.data):
            assert data is None or Path(data.file or "").is_file()


def test_every_bad_setting_is_named(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(
        '[data]\nfile = "a"\nwindows = 3\n[depth]\nmax_removed = 1.5\nmetric = "acc"\n[quality]\nwidths = [0]'
    )
    with pytest.raises(InputError) as caught:
        load_recipe(path)
    assert str(caught.value) == (
        "The recipe has settings that cannot be used: data.windows is not a setting (Did you mean 'window'?); "
        "depth.metric: input should be 'loss', 'perplexity' or 'accuracy'; "
        "depth.max_removed: give a whole number of layers, or a share of them below 1; "
        "quality.widths.0: input should be greater than 0.\n"
        f"  where: {path}\n"
        "  next:  Correct them; docs/toml.md lists every setting."
    )


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ('[data]\nfile = "a"\nhub = "b"', "data: give either 'file' or 'hub'"),
        ("[data]", "data: give either 'file' or 'hub'"),
        (
            '[data]\nfile = "a"\n[depth]\nmode = "racing"\nbeam = 2',
            "depth: racing keeps one choice per cell; leave 'beam' out, or use mode 'exact'",
        ),
        (
            '[data]\nfile = "a"\n[quality]\nmetric = "accuracy"',
            "quality.metric = 'accuracy' needs data.kind = 'choices'",
        ),
        ('[data]\nfile = "a"\nheldout = 0', "data.heldout must be at least 1: quality is measured there"),
    ],
)
def test_settings_that_do_not_go_together(tmp_path: Path, text: str, problem: str) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(text)
    with pytest.raises(InputError) as caught:
        load_recipe(path)
    assert caught.value.what == f"The recipe has settings that cannot be used: {problem}."


def test_unknown_recipes(tmp_path: Path) -> None:
    with pytest.raises(UnknownName) as caught:
        load_recipe("quik")
    assert str(caught.value) == (
        "There is no recipe named 'quik'. Did you mean 'quick'?\n  next:  Choose one of: default, paper, quick."
    )
    with pytest.raises(NotFound) as missing:
        load_recipe(tmp_path / "none.toml")
    assert missing.value.what == f"The recipe was not found: {tmp_path / 'none.toml'}"


def test_max_removed_is_a_number_or_a_share() -> None:
    assert DepthRecipe(max_removed=12).removed_of(30) == 12
    assert DepthRecipe(max_removed=0.34).removed_of(30) == 10
    assert DepthRecipe(max_removed=0.34).removed_of(2) == 1
    assert DepthRecipe(max_removed=0.99).removed_of(4) == 3
    assert DepthRecipe(max_removed=0.99, keep_last=2).removed_of(4) == 2


def test_identity_follows_settings_and_data_not_places(tmp_path: Path) -> None:
    recipes = []
    for i, (text, window) in enumerate((("one", 8), ("one", 8), ("two", 8), ("one", 9))):
        folder = tmp_path / str(i)
        folder.mkdir()
        (folder / "text.txt").write_text(text)
        path = folder / f"recipe{i}.toml"
        path.write_text(f'memory_mb = {100 + i}\n[data]\nfile = "text.txt"\nwindow = {window}')
        recipes.append(load_recipe(path).identity)
    assert recipes[0] == recipes[1]
    assert len(set(recipes)) == 3
