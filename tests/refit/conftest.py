from __future__ import annotations

from pathlib import Path

import pytest

from amoeba_export.refit import RefitRecipe
from amoeba_export.refit.recipe import Share
from tests.model.models import random_text


@pytest.fixture(scope="session")
def texts(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("texts")
    for name, seed in (("mixed.txt", 0), ("another.txt", 1)):
        (folder / name).write_text(random_text(9000, seed), encoding="utf-8")
    return folder / "mixed.txt", folder / "another.txt"


@pytest.fixture
def recipe(texts: tuple[Path, Path]) -> RefitRecipe:
    return RefitRecipe(
        name="tiny",
        tokens=4096,
        judge_tokens=512,
        other_tokens=512,
        window=32,
        mix=(Share(file=str(texts[0])),),
        other=(Share(file=str(texts[1])),),
    )
