from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest

from amoeba_export.cli.app import main


@dataclass(frozen=True)
class Run:
    code: int
    out: str
    err: str


@pytest.fixture
def amoeba(capsys: pytest.CaptureFixture[str]) -> Callable[..., Run]:
    """Run one command through `main`, as the console script does."""

    def run(*words: object) -> Run:
        capsys.readouterr()
        code = main([str(word) for word in words])
        captured = capsys.readouterr()
        return Run(code, captured.out, captured.err)

    return run
