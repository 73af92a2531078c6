"""What a user reads for a budget that the full model keeps, a coarser one alone, a subnet alone, and nothing."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.application.test_pipeline import model, precisions, strategy, target
from tests.conftest import Run

__all__ = ["model", "precisions", "strategy", "target"]

Export = Callable[[str], Run]
WHOLE = "The whole model in {} keeps the budget, and no subnet is better: none is cut."


@pytest.fixture
def export(amoeba: Callable[..., Run], model: Path, strategy: Path, precisions: Path, tmp_path: Path) -> Export:
    """With int8 in half the time of fp32, and int4 in 0.3 of it."""

    def run(latency: str) -> Run:
        words = ("export", model, "--target", precisions, "--strategy", strategy, "--out", tmp_path / "out")
        return amoeba(*words, "--latency", latency)

    return run


def rows(run: Run) -> dict[str, str]:
    """The facts of the answer."""
    pairs = (re.split(r"  +", line.strip(), maxsplit=1) for line in run.out.splitlines() if "  " in line)
    return {name: " ".join(value.split()) for name, value in pairs}


def test_a_budget_that_the_full_model_keeps(export: Export) -> None:
    run = export("5ms")
    assert run.code == 0
    assert WHOLE.format("fp32") in run.out.splitlines()
    assert rows(run)["dtype"] == "fp32"
    assert rows(run)["used"] == "94 % of the budget"


def test_a_budget_that_only_a_coarser_full_model_keeps(export: Export) -> None:
    run = export("75%")
    assert run.code == 0
    assert WHOLE.format("int8") in run.out.splitlines()
    found = rows(run)
    assert found["shape"].startswith("4x1 ")
    assert found["used"] == "67 % of the budget"
    assert found["whole in fp32"].endswith(" ms, loss 4, misses the budget")
    assert found["whole in int8"].endswith(" ms, loss 4.01, keeps the budget")
    assert found["whole in int4"].endswith(" ms, loss 4.3, keeps the budget")


def test_a_budget_that_only_a_subnet_keeps(export: Export) -> None:
    run = export("25%")
    assert run.code == 0
    assert "none is cut" not in run.out
    found = rows(run)
    assert found["dtype"] == "int4"
    assert not found["shape"].startswith("4x1 ")
    for dtype in ("fp32", "int8", "int4"):
        assert found[f"whole in {dtype}"].endswith(", misses the budget")
    assert float(found["used"].split()[0]) <= 100
    assert re.search(r"^Building \S+ in int4: \S+ ms expected, the limit is \S+ ms\.$", run.err, re.MULTILINE)


def test_a_budget_that_nothing_keeps(export: Export, tmp_path: Path) -> None:
    run = export("2%")
    assert (run.code, run.out) == (4, "")
    what, then = run.err.splitlines()[-2:]
    assert re.fullmatch(
        r"error: No shape that the strategy knows meets decode p50 <= \S+ ms; the closest, 2x0\.5 in int4, reaches "
        r"\S+ ms(, give or take \d+ %)?\.",
        what,
    )
    assert re.fullmatch(
        r"  next:  Allow \S+ ms or more, or calibrate with more removed layers or smaller widths\.", then
    )
    assert not (tmp_path / "out").exists()
