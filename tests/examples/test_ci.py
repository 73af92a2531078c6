"""The CI files in `examples/ci` do what they say: their shell steps are run here, in a project with a tiny model."""

from __future__ import annotations

import dataclasses
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from amoeba_export.builds.read import read_config
from amoeba_export.load import load_supernet, write_strategy
from tests.materialize.subnets import noise_strategy
from tests.warm import warm_command

CI = Path(__file__).parents[2] / "examples" / "ci"

PROJECT = """\
[model]
path = "model"
[defaults]
strategy = "strategy.safetensors"
refit = "off"
target = "jetson"
formats = ["safetensors"]
[[build]]
name = "laptop"
shape = "3x0.5"
[[build]]
name = "jetson"
shape = "3x1"
"""


@pytest.fixture(scope="module")
def commands(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder of `amoeba`."""
    folder = tmp_path_factory.mktemp("bin")
    with warm_command(folder):
        yield folder


@pytest.fixture
def project(tiny_dirs: dict[str, Path], tmp_path: Path) -> Path:
    folder = tmp_path / "project"
    shutil.copytree(tiny_dirs["llama"], folder / "model")
    supernet = load_supernet(str(folder / "model"))
    strategy = dataclasses.replace(noise_strategy(supernet.architecture), model_id=supernet.identity)
    write_strategy(strategy, folder / "strategy.safetensors")
    (folder / "amoeba.toml").write_text(PROJECT)
    return folder


def _bash(script: str, commands: Path, project: Path, **more: str) -> str:
    path = os.pathsep.join([str(commands), str(Path(sys.executable).parent), os.environ["PATH"]])
    cache = str(project / ".amoeba-cache")
    done = subprocess.run(
        ["bash", "-e", "-o", "pipefail", "-c", script],
        cwd=project,
        env=os.environ | {"PATH": path, "HF_HUB_OFFLINE": "1", "ENTRY": "laptop", "AMOEBA_CACHE": cache} | more,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def _github() -> dict[str, Any]:
    data: dict[str, Any] = yaml.safe_load((CI / "github-actions.yml").read_text())
    return data


def _gitlab() -> dict[str, Any]:
    data: dict[str, Any] = yaml.safe_load((CI / "gitlab-ci.yml").read_text())
    return data


def test_the_jobs_are_the_entries_of_the_file_beside_them() -> None:
    names = [entry.name for entry in read_config(CI / "amoeba.toml").entries]
    assert [row["entry"] for row in _github()["jobs"]["build"]["strategy"]["matrix"]["include"]] == names
    assert _gitlab()["models"]["parallel"]["matrix"] == [{"ENTRY": names}]


def test_github_steps_build_check_compare_and_report(commands: Path, project: Path, tmp_path: Path) -> None:
    """Twice, as two pushes to main: the second is locked, and compared with the first."""
    steps = {step["name"]: step["run"] for step in _github()["jobs"]["build"]["steps"] if "run" in step}
    assert list(steps) == [
        "Install",
        "Build",
        "Checksums and provenance",
        "Not slower than before",
        "Keep it for the next run",
        "Summary",
    ]
    summary = tmp_path / "summary.md"
    del steps["Install"]  # what it installs is what runs this test
    _bash("\n".join(steps.values()), commands, project, GITHUB_STEP_SUMMARY=str(summary))
    assert summary.read_text().count("## amoeba build: 1 built, 1 skipped") == 1
    assert (project / "baseline" / "laptop" / "amoeba.json").is_file()
    assert (project / "amoeba.lock").is_file()
    shutil.rmtree(project / "dist")
    out = _bash("\n".join(steps.values()), commands, project, GITHUB_STEP_SUMMARY=str(summary))
    assert "decode ratio" in out
    assert (project / "dist" / "bench.png").is_file()
    assert ", locked, " in summary.read_text()


def test_gitlab_script_builds_checks_and_compares(commands: Path, project: Path) -> None:
    job = _gitlab()["models"]
    script = "\n".join(job["script"])
    main = {"CI_COMMIT_BRANCH": "main", "CI_DEFAULT_BRANCH": "main"}
    _bash(script, commands, project, **main)
    assert (project / "baseline" / "laptop" / "amoeba.json").is_file()
    assert (project / job["artifacts"]["reports"]["junit"]).is_file()
    assert all((project / path).exists() for path in job["artifacts"]["paths"])
    assert set(job["cache"]["paths"]) >= {".amoeba-cache", "baseline"}
