from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from amoeba_export.errors import DamagedFile, InputError, NotFound, TargetError, WrongModel
from amoeba_export.ir import DenseArchitecture, Latency, Workload
from amoeba_export.profile import (
    CostTable,
    cost_key,
    design_graphs,
    fit_cost_table,
    read_table,
    refine,
    table_to_json,
    write_table,
)
from tests.profile.machines import SMOL, Machine, dense, random_dense


def _measured(machine: Machine, *lengths: int) -> list[tuple[DenseArchitecture, Latency]]:
    graphs = design_graphs(SMOL, align=8)
    return [(graph, machine.measure(graph, Workload(prompt_tokens=n))) for n in lengths or (128,) for graph in graphs]


def _table(machine: Machine, *lengths: int) -> CostTable:
    return fit_cost_table(_measured(machine, *lengths), target="cpu", dtype="fp32")


@pytest.mark.parametrize("metric", ["decode", "prefill", "e2e"])
@pytest.mark.parametrize("percentile", [50, 90])
def test_an_additive_machine_is_predicted_exactly(metric: str, percentile: int) -> None:
    machine = Machine()
    table = _table(machine)
    rng = np.random.default_rng(0)
    for _ in range(20):
        model = random_dense(rng)
        ms, error = table.predict(model, metric, percentile)  # type: ignore[arg-type]
        assert ms == pytest.approx(machine.measure(model).of(metric, percentile), rel=1e-9)  # type: ignore[arg-type]
        assert error < 1e-6


def test_two_prompt_lengths_tell_a_third() -> None:
    machine = Machine()
    table = _table(machine, 128, 512)
    model, workload = dense((9, 3, 1000), (3, 1, 1536), (0, 0, 512)), Workload(prompt_tokens=2048)
    for metric in ("decode", "prefill"):
        ms, _ = table.predict(model, metric, workload=workload)
        assert ms == pytest.approx(machine.measure(model, workload).of(metric), rel=1e-9)


def test_one_prompt_length_does_not_tell_another() -> None:
    with pytest.raises(InputError) as error:
        _table(Machine()).predict(dense((9, 3, 1536)), workload=Workload(prompt_tokens=64))
    assert str(error.value) == (
        "The cost table was measured with 128 prompt tokens and cannot tell the latency at 64.\n"
        "  next:  Profile the target again with --prompt 64."
    )


def test_error_bars_hold_nine_of_ten_new_measurements() -> None:
    """40 noisy machines, 10 held-out shapes each: the share inside the interval is near 90 %."""
    inside = []
    for seed in range(40):
        rng = np.random.default_rng(seed)
        machine = Machine(noise=0.03, rng=rng)
        table = _table(machine)
        for _ in range(10):
            model = random_dense(rng)
            for metric in ("decode", "prefill"):
                ms, error = table.predict(model, metric)
                inside.append(abs(machine.measure(model).of(metric) / ms - 1) < error)
    assert 0.85 < np.mean(inside) < 0.96


def test_error_bars_grow_outside_of_what_was_measured() -> None:
    table = _table(Machine(noise=0.03))
    _, at_home = table.predict(dense(*[(9, 3, 960)] * 24))
    _, far_away = table.predict(dense(*[(9, 3, 960)] * 1))
    assert far_away > at_home


def test_leave_one_out_is_of_the_size_of_the_noise() -> None:
    table = _table(Machine(noise=0.03))
    assert 0.005 < table.fits["decode_p50"].median_error < 0.1


def test_json_round_trip_is_exact(tmp_path: Path) -> None:
    table = _table(Machine(noise=0.02), 128, 256)
    write_table(table, tmp_path / "table.json")
    again = read_table(tmp_path / "table.json")
    assert again == table
    model = dense(*[(6, 2, 1001)] * 17)
    assert again.predict(model, "e2e", 90) == table.predict(model, "e2e", 90)
    write_table(again, tmp_path / "again.json")
    assert (tmp_path / "again.json").read_bytes() == (tmp_path / "table.json").read_bytes()


def test_a_prediction_as_a_latency_is_called_recorded() -> None:
    latency = _table(Machine()).latency(dense(*[(9, 3, 1536)] * 30))
    assert latency.source == "recorded"
    assert latency.device["cpu"] == "imaginary"
    assert latency.decode.p90_ms == pytest.approx(1.05 * latency.decode.p50_ms)
    assert latency.decode.num_samples == 0
    assert latency.uncertainty is not None


def test_unreadable_tables(tmp_path: Path) -> None:
    path = tmp_path / "table.json"
    with pytest.raises(NotFound):
        read_table(path)
    path.write_text("{")
    with pytest.raises(DamagedFile):
        read_table(path)
    path.write_text("[]")
    with pytest.raises(DamagedFile):
        read_table(path)
    data = table_to_json(_table(Machine()))
    path.write_text(json.dumps({**data, "schema_version": 99}))
    with pytest.raises(InputError, match="schema version 99"):
        read_table(path)
    del data["fits"]["decode_p90"]
    path.write_text(json.dumps(data))
    with pytest.raises(DamagedFile, match="it lacks the fit decode_p90"):
        read_table(path)


def test_another_model_is_refused() -> None:
    with pytest.raises(WrongModel) as error:
        _table(Machine()).predict(dense((9, 3, 1536), base=replace(SMOL, vocab_size=1000)))
    assert error.value.what == "The cost table was made for another model: its vocab_size is 49152, not 1000."


def test_another_batch_is_refused() -> None:
    with pytest.raises(InputError, match="measured with batch 1, not 4"):
        _table(Machine()).predict(dense((9, 3, 1536)), workload=Workload(batch=4))


def test_refine_pulls_towards_a_new_measurement_and_replaces_an_old_one() -> None:
    table = _table(Machine())
    model = dense(*[(6, 2, 1024)] * 20)
    before, _ = table.predict(model)
    slower = Machine(base_ms=4.0).measure(model)
    refined = refine(table, model, slower)
    after, _ = refined.predict(model)
    assert before < after <= slower.decode.p50_ms
    assert len(refined.measurements) == len(table.measurements) + 1
    assert len(refine(refined, model, Machine().measure(model)).measurements) == len(refined.measurements)
    restored, _ = refine(refined, model, Machine().measure(model)).predict(model)
    assert restored == pytest.approx(before, rel=1e-9)


def test_a_measurement_that_the_others_contradict_is_a_suspect() -> None:
    measured = _measured(Machine(noise=0.005))
    assert fit_cost_table(measured, target="cpu", dtype="fp32").suspects == ()
    graph, _ = measured[4]
    measured[4] = (graph, Machine(base_ms=3 + 0.6 * Machine().decode_ms(graph, 128)).measure(graph))
    assert 4 in fit_cost_table(measured, target="cpu", dtype="fp32").suspects


def test_too_few_graphs() -> None:
    with pytest.raises(TargetError) as error:
        fit_cost_table(_measured(Machine())[:6], target="cpu", dtype="fp32")
    assert error.value.what.startswith("6 measured graphs are too few for a cost table of 'cpu': these need ")


@pytest.mark.parametrize("bad", [float("nan"), -1.0, 0.0, float("inf")])
def test_an_impossible_time_is_refused(bad: float) -> None:
    measured = _measured(Machine())
    graph, latency = measured[2]
    measured[2] = (graph, replace(latency, prefill=replace(latency.prefill, p50_ms=bad)))
    with pytest.raises(TargetError) as error:
        fit_cost_table(measured, target="cpu", dtype="fp32")
    assert error.value.what == f"Measuring prefill on 'cpu' gave {bad} ms, which cannot be."
    assert error.value.where == "measurement 2"


def test_the_key_tells_what_a_table_depends_on() -> None:
    device = {"cpu": "imaginary", "threads": "2"}
    key = cost_key(SMOL, target="cpu", dtype="fp32", workload=Workload(), device=device)
    assert key == cost_key(
        replace(SMOL, rope_theta=5.0), target="cpu", dtype="fp32", workload=Workload(), device=dict(device)
    )
    others = {
        cost_key(replace(SMOL, ffn_size=8), target="cpu", dtype="fp32", workload=Workload(), device=device),
        cost_key(SMOL, target="gpu", dtype="fp32", workload=Workload(), device=device),
        cost_key(SMOL, target="cpu", dtype="int4", workload=Workload(), device=device),
        cost_key(SMOL, target="cpu", dtype="fp32", workload=Workload(prompt_tokens=1), device=device),
        cost_key(SMOL, target="cpu", dtype="fp32", workload=Workload(), device={**device, "threads": "1"}),
    }
    assert len(others | {key}) == 6
