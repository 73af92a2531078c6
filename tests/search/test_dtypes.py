from __future__ import annotations

import math
from dataclasses import replace
from functools import partial

import pytest

from amoeba_export.errors import NothingFits
from amoeba_export.ir import Budget, Shape
from amoeba_export.ir.derive import CutRules
from amoeba_export.profile import design_graphs, fit_cost_table
from amoeba_export.search import Found, Option, Problem, SearchResult, least_badness, search_precisions
from tests.profile.machines import SMOL, Machine
from tests.search.strategies import own_strategy, searched


def _search(dtype: str, limit: str) -> SearchResult:
    """int4 is twice as fast as fp32."""
    machine = Machine() if dtype == "fp32" else Machine(1.5, 0.02, 0.015, 0.006, 0.0055, 0.00001, 0.00015)
    graphs = design_graphs(SMOL)
    table = fit_cost_table([(graph, machine.measure(graph)) for graph in graphs], target="cpu", dtype=dtype)
    return searched(own_strategy(), SMOL, table, [Budget.parse(limit)])


def _options(limit: str, **rises: float) -> list[Option]:
    return [
        Option(dtype=dtype, rise=rise, bound=rise, full_use=1.0, search=partial(_search, dtype, limit))
        for dtype, rise in rises.items()
    ]


def test_rounding_is_weighed_against_the_larger_subnet_that_it_affords() -> None:
    found = search_precisions(_options("14ms", fp32=0.0, int4=0.1))
    assert found.dtype == "int4"
    assert found.search.best.shape.depth == 30
    assert found.search.best.predicted_ms <= 14
    found = search_precisions(_options("14ms", fp32=0.0, int4=5.0))
    assert found.dtype == "fp32"
    assert found.badness < _search("int4", "14ms").best.quality.value + 5


def test_rounding_raises_a_perplexity_by_a_factor() -> None:
    """A rise of the loss by 0.1 is 1.1 at a perplexity of 10, and 10 at one of 100."""
    search = _search("int4", "90ms")
    worth = {}
    for value in (10.0, 100.0):
        candidate = replace(search.best, quality=search.best.quality._replace(value=value))
        result = replace(search, quality_metric="perplexity", candidates=(candidate,))
        worth[value] = Found(dtype="int4", rise=0.1, search=result).badness
    assert worth == pytest.approx({10: 10 * math.exp(0.1), 100: 100 * math.exp(0.1)})
    assert Found(dtype="int4", rise=0.1, search=search).badness == pytest.approx(search.best.quality.value + 0.1)


def test_the_first_precision_wins_a_tie() -> None:
    assert search_precisions(_options("90ms", fp32=0.0, int4=0.0)).dtype == "fp32"
    assert search_precisions(_options("90ms", int4=0.0, fp32=0.0)).dtype == "int4"


def test_a_precision_that_does_not_fit_is_passed_over() -> None:
    assert search_precisions(_options("8ms", fp32=0.0, int4=5.0)).dtype == "int4"
    with pytest.raises(NothingFits) as caught:
        search_precisions(_options("1ms", fp32=0.0, int4=5.0))
    with pytest.raises(NothingFits) as closest:
        _search("int4", "1ms")
    assert str(caught.value) == str(closest.value)


def test_what_cannot_be_better_is_not_searched() -> None:
    """A search costs a cost table: the whole model in int8 loses 0.1, and no subnet of the others can do better."""

    def hopeless() -> SearchResult:
        raise AssertionError("searched")

    whole = Found(dtype="int8", rise=0.1, search=_search("int4", "90ms"))
    bounds = {"fp32": whole.badness, "int4": whole.badness + 1}
    option = Option(dtype="", rise=0.0, bound=0.0, full_use=1.0, search=hopeless)
    options = [replace(option, dtype=name, bound=bound) for name, bound in bounds.items()]
    assert search_precisions(options, whole) is whole
    better = Option(dtype="fp32", rise=0.0, bound=0.0, full_use=1.0, search=partial(_search, "fp32", "90ms"))
    assert search_precisions([better], whole).dtype == "fp32"


def test_where_nothing_can_fit_the_fastest_says_what_comes_closest() -> None:
    fine, coarse = (replace(option, bound=math.inf) for option in _options("1ms", fp32=0.0, int4=0.0))
    hopeless = [replace(fine, full_use=20.0), replace(coarse, full_use=9.0)]
    with pytest.raises(NothingFits) as caught:
        search_precisions(hopeless)
    with pytest.raises(NothingFits) as closest:
        _search("int4", "1ms")
    assert str(caught.value) == str(closest.value)
    whole = Found(dtype="int4", rise=0.1, search=_search("int4", "90ms"))
    assert search_precisions(hopeless, whole) is whole


def test_least_badness_counts_what_could_fit() -> None:
    """A cut that keeps a share of the weights takes at least 0.8 of that share of the time."""
    problem = Problem(strategy=own_strategy(), architecture=SMOL, budgets=(Budget.parse("50%"),))
    losses = problem.strategy.quality
    assert least_badness(problem, 1.0) == losses[Shape(30, 1.0)]
    assert least_badness(problem, 1.25) == losses[Shape(30, 1.0)]
    assert losses[Shape(30, 1.0)] < least_badness(problem, 2.0) < losses[Shape(20, 0.5)]
    assert least_badness(problem, 10.0) == float("inf")
    assert least_badness(replace(problem, rules=CutRules(policy="adaptive")), 10.0) == min(losses.values())
