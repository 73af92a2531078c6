from __future__ import annotations

import subprocess
import sys
from pathlib import Path


def test_each_layer_imports_only_what_lies_below_it() -> None:
    """Runs import-linter with the contract in pyproject.toml."""
    call = [sys.executable, "-c", "from importlinter.cli import lint_imports_command as run; run()"]
    done = subprocess.run(call, cwd=Path(__file__).parents[1], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
