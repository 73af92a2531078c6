from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_each_layer_imports_only_what_lies_below_it() -> None:
    """Runs import-linter with the contract in pyproject.toml."""
    call = [sys.executable, "-c", "from importlinter.cli import lint_imports_command as run; run()"]
    done = subprocess.run(call, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_architecture_says_where_things_are_decided() -> None:
    """Every row names a file that is there and what decides in it."""
    text = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8")
    section = text.split("## Where is it decided")[1].split("\n## ")[0]
    rows = re.findall(r"^\| .+ \| `([^`]+)` \| `(\w+)` \|$", section, re.MULTILINE)
    assert len(rows) == section.count("\n|") - 2, "a row that is not: decision, file, name"
    for file, name in rows:
        content = (ROOT / "amoeba_export" / file).read_text(encoding="utf-8")
        assert re.search(rf"^\s*(def|class) {name}\b|^{name}\b.* = ", content, re.MULTILINE), f"{file} has no {name}"


def test_architecture_has_one_type_per_arrow() -> None:
    """Every type of the picture is one frozen dataclass."""
    text = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8")
    picture = text.split("## One type per arrow")[1].split("Each type is")[0]
    names = set(re.findall(r"\b[A-Z][a-z]+(?:[A-Z][a-z]+)*\b", picture)) - {"JSON"}
    code = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "amoeba_export").rglob("*.py"))
    assert len(names) >= 9
    for name in names:
        assert len(re.findall(rf"^@dataclass\(.*frozen=True.*\)\nclass {name}\b", code, re.MULTILINE)) == 1, name


def test_architecture_points_at_what_is_there() -> None:
    """Every path of the list `Where things are`, below the package or the repository."""
    text = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8")
    section = text.split("## Where things are")[1].split("\n## ")[0]
    for path in re.findall(r"`([\w./]+(?:/|\.py|\.toml))`", section):
        places = [ROOT / path, ROOT / "amoeba_export" / path, *(ROOT / "amoeba_export").glob(f"*/{path}")]
        assert any(place.exists() for place in places), path
