"""What lies around the code does what it says: workflows, templates, images, hooks, the changelog."""

from __future__ import annotations

import os
import re
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

from amoeba_export.version import __version__

ROOT = Path(__file__).parents[2]
GITHUB = ROOT / ".github"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


@pytest.mark.parametrize("path", sorted(GITHUB.rglob("*.yml")), ids=lambda path: path.name)
def test_they_are_yaml(path: Path) -> None:
    assert isinstance(yaml.safe_load(path.read_text(encoding="utf-8")), dict)


@pytest.mark.parametrize("path", sorted((GITHUB / "workflows").glob("*.yml")), ids=lambda path: path.name)
def test_workflows_ask_for_the_least_and_say_versions(path: Path) -> None:
    workflow: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert workflow["permissions"] == {"contents": "read"}
    steps = [step for job in workflow["jobs"].values() for step in job["steps"]]
    assert all("@" in step["uses"] for step in steps if "uses" in step)


def _release_step(name: str) -> str:
    jobs = yaml.safe_load((GITHUB / "workflows/release.yml").read_text(encoding="utf-8"))["jobs"]
    (step,) = [one for job in jobs.values() for one in job["steps"] if one.get("name") == name]
    return str(step["run"])


@pytest.mark.parametrize(("tag", "code"), [(f"v{__version__}", 0), (f"v{__version__}1", 1)])
def test_a_release_is_refused_unless_its_tag_is_the_version(tag: str, code: int) -> None:
    check = ["bash", "-ec", _release_step("The tag is the version")]
    assert subprocess.run(check, cwd=ROOT, env=os.environ | {"GITHUB_REF_NAME": tag}).returncode == code


def test_a_release_has_the_notes_of_its_version(tmp_path: Path) -> None:
    (tmp_path / "CHANGELOG.md").write_text(
        "# Changelog\n\n## [1.1.0] - 2027-01-02\n\n- new\n\n## [1.0.0] - 2027-01-01\n\n- old\n"
    )
    script = re.sub(r"^gh .*$", "", _release_step("Release with the section of this version"), flags=re.MULTILINE)
    subprocess.run(["bash", "-ec", script], cwd=tmp_path, env=os.environ | {"GITHUB_REF_NAME": "v1.1.0"}, check=True)
    assert (tmp_path / "notes.md").read_text().split() == ["-", "new"]


@pytest.mark.parametrize("path", sorted((ROOT / "docker").glob("*.Dockerfile")), ids=lambda path: path.name)
def test_images_copy_what_is_there_and_install_extras_that_exist(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert "\nUSER amoeba\n" in text
    for line in re.findall(r"^COPY (.*)$", text, re.MULTILINE):
        assert all((ROOT / source).exists() for source in line.split()[:-1]), line
    for extras in re.findall(r"'\.\[([\w,]+)\]'", text):
        assert set(extras.split(",")) <= set(PROJECT["optional-dependencies"])
    wheel = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["hatch"]["build"]["targets"]
    needed = {*wheel["wheel"]["packages"], *wheel["wheel"]["force-include"]}
    assert all(f"COPY {source} " in text for source in needed), "the wheel is built from less than it needs"


def test_hooks_run_tools_of_the_dev_extra() -> None:
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))["repos"][0]["hooks"]
    tools = {Path(hook["entry"].split()[0]).name for hook in hooks}
    assert tools == {"ruff", "codespell", "lint-imports", "python"}
    names = {re.split("[>=]", one)[0] for one in PROJECT["optional-dependencies"]["dev"]}
    assert {"ruff", "codespell", "import-linter"} <= names
