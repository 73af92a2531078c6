"""`examples/first_steps.ipynb` runs from top to bottom, on a tiny model and a `cpu` without a clock."""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch

from amoeba_export import backends
from amoeba_export.artifact import read_manifest
from tests.finetune.models import char_tokenizer
from tests.tiny import save_tiny

ROOT = Path(__file__).parents[2]
NOTEBOOK = json.loads((ROOT / "examples/first_steps.ipynb").read_text(encoding="utf-8"))
TINY = {'"demo"': '"model"', '"quick"': '"tiny.toml"', '"fast"': '"off"'}


def _code() -> list[str]:
    return ["".join(cell["source"]) for cell in NOTEBOOK["cells"] if cell["cell_type"] == "code"]


@pytest.fixture
def shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The pictures that the notebook shows; IPython is not needed for that."""
    torch.set_num_threads(1)
    char_tokenizer(save_tiny(tmp_path / "model"))
    text = f'[data]\nfile = "{ROOT}/calibration/wikitext2/wikitext2.txt"\nwindow = 32\n'
    (tmp_path / "tiny.toml").write_text(f"{text}samples = 4\nheldout = 4\n[depth]\nmax_removed = 0.25\n")
    monkeypatch.setattr(backends, "BACKENDS", {**backends.BACKENDS, "onnxruntime": "tests.docs.cpu:CPU"})
    monkeypatch.chdir(tmp_path)
    found: list[Path] = []
    display = types.ModuleType("IPython.display")
    display.Image = lambda filename: found.append(Path(filename))  # type: ignore[attr-defined]
    ipython = types.ModuleType("IPython")
    ipython.version_info = (9, 0)  # type: ignore[attr-defined] # matplotlib asks
    monkeypatch.setitem(sys.modules, "IPython", ipython)
    monkeypatch.setitem(sys.modules, "IPython.display", display)
    return found


def test_the_notebook_runs(shown: list[Path], tmp_path: Path) -> None:
    names: dict[str, Any] = {}
    settings, *cells = _code()
    for said, tiny in TINY.items():
        assert said in settings
        settings = settings.replace(said, tiny)
    for cell in (settings, *cells):
        exec(compile(cell, "first_steps.ipynb", "exec"), names)
    (picture,) = shown
    assert (tmp_path / picture).stat().st_size > 1000
    numbers = [point.number for point in names["found"].numbered]
    assert numbers == sorted(numbers)
    small = read_manifest(tmp_path / "dist/first-steps/small")
    assert str(small.shape.shape) == names["choice"].shape
    assert small.dtype == names["choice"].dtype
    assert set(names["replies"]) == {"whole", "small"}
    assert all(text.startswith("The three largest cities") for text in names["replies"].values())


def test_the_notebook_is_committed_without_outputs() -> None:
    """They would be one machine's, and each run would change them."""
    assert all(not cell.get("outputs") and cell.get("execution_count") is None for cell in NOTEBOOK["cells"])
