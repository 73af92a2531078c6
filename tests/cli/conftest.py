from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import typer

from amoeba_export import backends
from amoeba_export.cli import app as boundary
from tests.search.strategies import write_graded


@pytest.fixture
def model(tiny_dirs: dict[str, Path]) -> Path:
    return tiny_dirs["llama"]


@pytest.fixture
def strategy(model: Path, tmp_path: Path) -> Path:
    return write_graded(model, tmp_path / "inputs" / "strategy.safetensors")


@pytest.fixture
def target(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A target that is measured without a clock."""
    monkeypatch.setattr(backends, "BACKENDS", {**backends.BACKENDS, "imaginary": "tests.imaginary:BACKEND"})
    path = tmp_path / "inputs" / "imaginary.toml"
    path.parent.mkdir(exist_ok=True)
    path.write_text('description = "a rule"\nbackend = "imaginary"\nalign = 8\n')
    return path


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], Any]], None]:
    """Give the app a command `work` that does what a test wants."""
    fresh = typer.Typer(name="amoeba", no_args_is_help=True, pretty_exceptions_enable=False)
    fresh.callback()(boundary.amoeba)
    monkeypatch.setattr(boundary, "app", fresh)

    def register(work: Callable[[], Any]) -> None:
        fresh.command("work")(work)
        fresh.command("rest")(lambda: None)

    return register
