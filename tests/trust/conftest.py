from __future__ import annotations

import dataclasses
import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest

from amoeba_export.cli.app import main
from amoeba_export.load import load_supernet, write_strategy
from tests.formats.bpe import save_bpe
from tests.search.strategies import graded_strategy
from tests.tiny import save_tiny

RECIPE = """
[data]
file = "{text}"
window = 16
samples = 4
heldout = 4
[depth]
max_removed = 1
"""


@dataclass(frozen=True)
class Place:
    """A tiny model, what commands want beside it, and an artifact of it. Copy before you change anything."""

    model: Path
    strategy: Path
    recipe: Path
    text: Path
    data: Path
    artifact: Path


@pytest.fixture(scope="session")
def shared_place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    """Made once. Its artifact has layers that differ, so `modeling_amoeba.py` is in it."""
    root = tmp_path_factory.mktemp("trust")
    model = save_tiny(root / "model")
    save_bpe(model)
    strategy = root / "strategy.safetensors"
    made = dataclasses.replace(graded_strategy(load_supernet(str(model))), model_id=None)
    write_strategy(made, strategy)  # it fits whatever a test does to the config
    text = root / "text.txt"
    text.write_text("The river rises in the hills north of the town and runs to the sea. " * 60)
    recipe = root / "recipe.toml"
    recipe.write_text(RECIPE.format(text=text))
    data = root / "data.jsonl"
    data.write_text("".join(json.dumps({"instruction": f"Say {i}.", "output": f"{i}!"}) + "\n" for i in range(8)))
    words = ["export", model, "--strategy", strategy, "--shape", "3x0.5", "--policy", "adaptive"]
    words += ["--format", "safetensors,onnx", "--dtype", "fp32", "--out", root / "artifact"]
    assert main([str(word) for word in words]) == 0
    assert (root / "artifact" / "safetensors" / "modeling_amoeba.py").is_file()
    return Place(model, strategy, recipe, text, data, root / "artifact")


@pytest.fixture
def place(shared_place: Place, tmp_path: Path) -> Place:
    """A copy of model and artifact to change."""
    shutil.copytree(shared_place.model, tmp_path / "model")
    shutil.copytree(shared_place.artifact, tmp_path / "artifact")
    return dataclasses.replace(shared_place, model=tmp_path / "model", artifact=tmp_path / "artifact")
