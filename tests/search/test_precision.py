from __future__ import annotations

import pytest

from amoeba_export.errors import NothingFits
from amoeba_export.ir import Budget
from amoeba_export.profile import design_graphs, fit_cost_table
from amoeba_export.search import SearchResult, search_precision
from tests.profile.machines import SMOL, Machine
from tests.search.strategies import own_strategy, searched


def _search(dtype: str, limit: str) -> SearchResult:
    """int4 is twice as fast as fp32."""
    machine = Machine() if dtype == "fp32" else Machine(1.5, 0.02, 0.015, 0.006, 0.0055, 0.00001, 0.00015)
    graphs = design_graphs(SMOL)
    table = fit_cost_table([(graph, machine.measure(graph)) for graph in graphs], target="cpu", dtype=dtype)
    return searched(own_strategy(), SMOL, table, [Budget.parse(limit)])


def test_rounding_is_weighed_against_the_larger_subnet_that_it_affords() -> None:
    dtype, result = search_precision(
        ["fp32", "int4"], lambda one: _search(one, "14ms"), worse_by={"fp32": 0.0, "int4": 0.1}
    )
    assert dtype == "int4"
    assert result.best.shape.depth == 30
    assert result.best.predicted_ms <= 14
    dtype, result = search_precision(
        ["fp32", "int4"], lambda one: _search(one, "14ms"), worse_by={"fp32": 0.0, "int4": 5.0}
    )
    assert dtype == "fp32"
    assert result.best.quality.value < _search("int4", "14ms").best.quality.value + 5


def test_the_first_precision_wins_a_tie() -> None:
    worse_by = {"fp32": 0.0, "int4": 0.0}
    assert search_precision(["fp32", "int4"], lambda one: _search(one, "90ms"), worse_by=worse_by)[0] == "fp32"
    assert search_precision(["int4", "fp32"], lambda one: _search(one, "90ms"), worse_by=worse_by)[0] == "int4"


def test_a_precision_that_does_not_fit_is_passed_over() -> None:
    worse_by = {"fp32": 0.0, "int4": 5.0}
    assert search_precision(["fp32", "int4"], lambda one: _search(one, "8ms"), worse_by=worse_by)[0] == "int4"
    with pytest.raises(NothingFits):
        search_precision(["fp32", "int4"], lambda one: _search(one, "1ms"), worse_by=worse_by)
