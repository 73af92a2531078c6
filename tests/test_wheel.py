"""The wheel, installed: its data is found, and optimum finds its command."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from amoeba_export.ir import SubnetPlan
from amoeba_export.load import load_supernet
from tests.tiny import save_tiny

ROOT = Path(__file__).parents[1]


def run(*words: str | Path, folder: Path, **environment: str) -> str:
    """Run a command and return what it printed."""
    done = subprocess.run(
        [str(word) for word in words],
        cwd=folder,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr + done.stdout
    return done.stdout


def files_in(folder: Path) -> set[Path]:
    return {path.relative_to(folder) for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A virtual environment with the wheel and nothing else; its folder of packages."""
    root = tmp_path_factory.mktemp("wheel")
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "-q")
    run(*pip, "wheel", "--no-deps", "--no-build-isolation", "--no-index", "-w", root / "dist", ROOT, folder=root)
    run(sys.executable, "-m", "venv", "--without-pip", root / "venv", folder=root)
    python = root / "venv" / "bin" / "python"
    (wheel,) = (root / "dist").glob("*.whl")
    run(*pip, "--python", python, "install", "--no-deps", "--no-index", wheel, folder=root)
    (packages,) = (root / "venv" / "lib").glob("python*/site-packages")
    return packages


def test_targets_and_calibration_sets_are_in_the_wheel(installed: Path) -> None:
    for kind in ("targets", "calibration"):
        program = f"from amoeba_export.locations import data_dir; print(data_dir({kind!r}))"
        found = Path(run(installed.parents[2] / "bin" / "python", "-c", program, folder=installed).strip())
        assert found == installed / "amoeba_export" / "_data" / kind
        assert files_in(found) == files_in(ROOT / kind)


def test_nothing_else_is_in_the_wheel(installed: Path) -> None:
    """A namespace package of optimum's has no `__init__.py`: with one it would hide optimum itself."""
    assert {path.name for path in installed.iterdir() if path.suffix != ".dist-info"} == {"amoeba_export", "optimum"}
    assert [str(path.relative_to(installed)) for path in (installed / "optimum").rglob("*.py")] == [
        "optimum/commands/register/register_amoeba.py"
    ]


def optimum_cli(*words: str | Path, folder: Path) -> str:
    program = "from optimum.commands.optimum_cli import main; main()"
    return run(sys.executable, "-c", program, *words, folder=folder, HF_HUB_OFFLINE="1")


def test_optimum_has_our_export_with_our_flags(tmp_path: Path) -> None:
    """The same command under another name: from an editable install as from a wheel."""
    model = save_tiny(tmp_path / "model")
    plan = SubnetPlan.full(load_supernet(str(model)).architecture)
    (tmp_path / "plan.json").write_text(json.dumps(plan.to_json()), encoding="utf-8")
    words = ("export", "amoeba", model, "--plan", "plan.json", "--format", "safetensors", "--out", "cut", "--json")
    answer = json.loads(optimum_cli(*words, folder=tmp_path))
    assert answer["shape"]["depth"] == 4
    assert (tmp_path / "cut" / "amoeba.json").is_file()


def test_optimum_keeps_its_own_commands(tmp_path: Path) -> None:
    assert "optimum" in optimum_cli("env", folder=tmp_path)
    assert "amoeba" in optimum_cli("export", "--help", folder=tmp_path)
    assert "--require-measured" in optimum_cli("export", "amoeba", "--help", folder=tmp_path)
