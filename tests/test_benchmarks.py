"""Benchmarks are run by hand, months apart: at least their imports hold."""

from __future__ import annotations

import ast
import importlib
from pathlib import Path

import pytest

import benchmarks

SCRIPTS = sorted(Path(next(iter(benchmarks.__path__))).glob("[!_]*.py"))


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_what_a_benchmark_takes_from_amoeba_is_there(script: Path) -> None:
    for node in ast.walk(ast.parse(script.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.ImportFrom) or not (node.module or "").startswith(("amoeba_export", "benchmarks")):
            continue
        module = importlib.import_module(node.module or "")
        for name in node.names:
            if not hasattr(module, name.name):
                importlib.import_module(f"{node.module}.{name.name}")
