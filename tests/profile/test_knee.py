"""A device that reads weights beyond its cache at a higher price: where the knee is, and what it may not spoil."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import cache
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from amoeba_export.errors import DamagedFile
from amoeba_export.ir import DenseArchitecture, Latency, Target, Workload
from amoeba_export.profile import (
    CostTable,
    Profiling,
    design_graphs,
    fit_cost_table,
    read_table,
    record_cost_table,
    table_from_json,
    table_to_json,
    write_table,
)
from amoeba_export.profile.design import graphs_between
from amoeba_export.profile.features import counts_of, dims_of, weights_read
from tests.profile.machines import SMOL, Machine, random_dense

BENT = Machine(knee=60.0, beyond_ms=0.15)
TARGET = Target(name="bent", description="a knee", backend="imaginary")


@cache
def _bent() -> CostTable:
    return _recorded(BENT)[0]


def _recorded(machine: Machine) -> tuple[CostTable, list[DenseArchitecture]]:
    asked: list[DenseArchitecture] = []

    def measure(graphs: Sequence[DenseArchitecture], workload: Workload) -> list[Latency]:
        asked.extend(graphs)
        return [machine.measure(graph, workload) for graph in graphs]

    return record_cost_table(SMOL, measure, Profiling(target=TARGET, dtype="fp32", workload=Workload())), asked


def _errors(table: CostTable, machine: Machine) -> list[float]:
    rng = np.random.default_rng(1)
    models = [random_dense(rng) for _ in range(30)]
    return [table.predict(one)[0] / machine.measure(one).of("decode") - 1 for one in models]


def test_the_knee_is_found_between_graphs_that_are_added() -> None:
    table, asked = _recorded(BENT)
    assert len(asked) == 15
    for percentile in (50, 90):
        assert table.fits[f"decode_p{percentile}"].knee == pytest.approx(60, rel=0.1)
    assert table.fits["prefill_p50"].knee is None
    errors = np.abs(_errors(table, BENT))
    assert np.median(errors) < 0.02
    assert max(errors) < 0.05
    graphs = design_graphs(SMOL)
    sum_alone = fit_cost_table([(one, BENT.measure(one)) for one in graphs[:9]], target="bent", dtype="fp32")
    assert sum_alone.fits["decode_p50"].knee is None  # too few to tell
    assert np.median(np.abs(_errors(sum_alone, BENT))) > 3 * np.median(errors)


@pytest.mark.parametrize("noise", [0.0, 0.02])
def test_a_sum_stays_a_sum(noise: float) -> None:
    for seed in range(10):
        table, asked = _recorded(Machine(noise=noise, rng=np.random.default_rng(seed)))
        assert all(fit.knee is None and "beyond_knee" not in fit.columns for fit in table.fits.values())
        assert len(asked) <= (12 if noise == 0 else 15)


@pytest.mark.parametrize("metric", ["decode", "prefill", "e2e"])
def test_a_prediction_is_the_larger_of_sums(metric: str) -> None:
    table, rng = _bent(), np.random.default_rng(2)
    for _ in range(20):
        model = random_dense(rng)
        pieces = table.pieces(model, metric)  # type: ignore[arg-type]
        assert len(pieces) == (1 if metric == "prefill" else 2)
        assert max(pieces) == pytest.approx(table.predict(model, metric)[0], rel=1e-12)  # type: ignore[arg-type]


def test_the_pieces_add_up_over_layers() -> None:
    table, rng = _bent(), np.random.default_rng(3)
    model = random_dense(rng)
    half = len(model.layers) // 2
    parts = [dataclasses.replace(model, layers=layers) for layers in (model.layers[:half], model.layers[half:], ())]
    first, second, nothing, whole = (np.array(table.pieces(one)) for one in (*parts, model))
    assert first + second - nothing == pytest.approx(whole)


def test_a_table_with_a_knee_is_read_back(tmp_path: Path) -> None:
    write_table(_bent(), tmp_path / "table.json")
    again = read_table(tmp_path / "table.json")
    assert again == _bent()


def test_a_table_of_the_version_before_is_read() -> None:
    graphs = design_graphs(SMOL)
    table = fit_cost_table([(one, Machine().measure(one)) for one in graphs], target="cpu", dtype="fp32")
    old = table_to_json(table)
    old["schema_version"] = 1
    for fit in old["fits"].values():
        assert fit.pop("knee") is None
    assert table_from_json(old) == table


@pytest.mark.parametrize(
    ("knee", "problem"),
    [(-1.0, "its knee is at -1.0"), (1e10, "its knee is at 10000000000.0"), (None, "beyond_knee")],
)
def test_a_knee_that_cannot_be(knee: float | None, problem: str) -> None:
    data = table_to_json(_bent())
    data["fits"]["decode_p50"]["knee"] = knee
    with pytest.raises(DamagedFile, match=problem):
        table_from_json(data)


def test_graphs_between_fill_the_widest_gaps() -> None:
    measured = design_graphs(SMOL)
    added = graphs_between(SMOL, measured, num_graphs=3, align=32)
    assert not set(added) & set(measured)
    assert all(layer.ffn_size % 32 == 0 for one in added for layer in one.layers)

    def widest(graphs: Sequence[DenseArchitecture]) -> float:
        sizes = sorted(weights_read(counts_of(one), dims_of(SMOL)) for one in graphs)
        return max(b - a for a, b in pairwise(sizes))

    assert widest([*measured, *added]) < 0.6 * widest(measured)


def test_weights_read_are_those_of_the_layers() -> None:
    rng = np.random.default_rng(4)
    model = random_dense(rng)
    weights = sum(SMOL.prunable_params(layer) for layer in model.layers)
    assert weights_read(counts_of(model), dims_of(SMOL)) == pytest.approx(weights / 1e6)
