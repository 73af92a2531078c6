"""A project folder: a tiny model, its strategy, two targets that follow a rule, and an amoeba.toml."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from amoeba_export import backends
from amoeba_export.builds.outcome import BuildReport
from amoeba_export.builds.run import BuildOptions, build
from tests import imaginary
from tests.search.strategies import write_graded

HEAD = """\
[model]
path = "model"
[defaults]
strategy = "strategy.safetensors"
formats = ["safetensors"]
refit = "off"
"""
TWO = """\
[[build]]
name = "whole"
shape = "3x1"
[[build]]
name = "half"
shape = "3x0.5"
"""

Build = Callable[..., BuildReport]


@pytest.fixture(scope="session")
def prepared(tiny_dirs: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("prepared") / "project"
    shutil.copytree(tiny_dirs["llama"], folder / "model")
    write_graded(folder / "model", folder / "strategy.safetensors", cache_dir=folder.parent / "cache")
    (folder / "imaginary.toml").write_text('description = "a rule"\nbackend = "imaginary"\nalign = 8\n')
    (folder / "amoeba.toml").write_text(HEAD + TWO)
    return folder


@pytest.fixture
def project(prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder, in which the test stands."""
    monkeypatch.setattr(backends, "BACKENDS", {**backends.BACKENDS, "imaginary": "tests.imaginary:BACKEND"})
    imaginary.BACKEND.measured_artifacts.clear()
    folder = tmp_path / "project"
    shutil.copytree(prepared, folder)
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def run(project: Path) -> Build:
    def run(**options: object) -> BuildReport:
        return build(project / "amoeba.toml", BuildOptions(**options))  # type: ignore[arg-type]

    return run


def statuses(report: BuildReport) -> dict[str, str]:
    return {entry.name: entry.status for entry in report.entries}
