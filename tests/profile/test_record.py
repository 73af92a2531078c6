from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from amoeba_export.errors import TargetError
from amoeba_export.ir import DenseArchitecture, Latency, Target, Workload
from amoeba_export.profile import measure_interleaved, predict_memory_mb, record_cost_table
from amoeba_export.profile.rounds import median_polish
from tests.profile.machines import SMOL, Machine, dense, random_dense

CPU = Target(name="cpu", description="", backend="imaginary", align=8)


def test_median_polish_takes_out_a_slow_round_and_an_outlier() -> None:
    subjects = np.array([10.0, 20.0, 40.0, 80.0])
    times = subjects[:, None] * np.array([1.0, 1.3, 0.95])
    polished, noise = median_polish(times)
    assert polished == pytest.approx(subjects, rel=1e-9)
    assert noise.max() < 1e-9
    times[2, 0] *= 3
    assert median_polish(times)[0] == pytest.approx(subjects, rel=1e-9)


def test_median_polish_bridges_what_is_missing() -> None:
    times = np.array([[10.0, 13.0, 10.0], [20.0, np.nan, 20.0], [np.nan] * 3])
    polished, _ = median_polish(times)
    assert polished[:2] == pytest.approx([10.0, 20.0])
    assert np.isnan(polished[2])


def test_rounds_run_to_and_fro_and_one_failure_stops_nobody() -> None:
    order: list[int] = []

    def measure(depth: int) -> Latency:
        order.append(depth)
        if depth == 2:
            raise TargetError("out of memory")
        return Machine().measure(dense(*[(9, 3, 1536)] * depth))

    result = measure_interleaved([1, 2, 3], measure, rounds=2)
    assert order == [1, 2, 3, 3, 1]
    assert result.latencies[1] is None
    assert result.errors[1].what == "out of memory"
    first = result.latencies[0]
    assert first is not None
    assert first.decode.p50_ms == pytest.approx(Machine().measure(dense((9, 3, 1536))).decode.p50_ms)
    assert first.decode.p90_ms == pytest.approx(1.05 * first.decode.p50_ms)
    assert first.decode.num_samples == 40
    assert first.decode.noise == pytest.approx(0, abs=1e-12)


def test_a_table_from_a_machine_that_slows_down() -> None:
    """The machine is 25 % slower in the second round; the table does not show it."""
    steady, calls = Machine(), []

    def measure(model: DenseArchitecture, workload: Workload) -> Latency:
        calls.append(model)
        machine = Machine() if not 12 < len(calls) <= 24 else _slower(1.25)
        return machine.measure(model, workload)

    table = record_cost_table(SMOL, measure, target=CPU, dtype="fp32", workload=Workload(), rounds=3)
    assert len(calls) == 36
    model = random_dense(np.random.default_rng(3))
    assert table.predict(model)[0] == pytest.approx(steady.measure(model).decode.p50_ms, rel=1e-3)


def _slower(factor: float) -> Machine:
    machine = Machine()
    for name in ("base_ms", "attention_ms", "ffn_ms", "head_ms", "kv_head_ms", "kv_token_ms", "neuron_ms"):
        setattr(machine, name, factor * getattr(machine, name))
    return machine


def test_a_suspect_is_measured_again() -> None:
    calls: list[DenseArchitecture] = []

    def measure(model: DenseArchitecture, workload: Workload) -> Latency:
        calls.append(model)
        return (_slower(2) if len(calls) == 6 else Machine()).measure(model, workload)

    table = record_cost_table(SMOL, measure, target=CPU, dtype="fp32", workload=Workload(), rounds=1)
    assert len(calls) > 12
    assert calls[5] in calls[12:]
    assert table.suspects == ()
    assert table.predict(calls[5])[0] == pytest.approx(Machine().measure(calls[5]).decode.p50_ms, rel=1e-9)


def test_graphs_that_do_not_run_are_left_out() -> None:
    def measure(model: DenseArchitecture, workload: Workload) -> Latency:
        if len(model.layers) == 30 and all(layer == SMOL.layer_dims for layer in model.layers):
            raise TargetError("The full model does not fit into the memory of the device.")
        return Machine().measure(model, workload)

    table = record_cost_table(SMOL, measure, target=CPU, dtype="fp32", workload=Workload(), rounds=1)
    assert len(table.measurements) == 11


def test_a_target_that_measures_nothing_says_why() -> None:
    def measure(model: DenseArchitecture, workload: Workload) -> Latency:
        raise TargetError("The device is gone.")

    with pytest.raises(TargetError, match=r"The device is gone\."):
        record_cost_table(SMOL, measure, target=CPU, dtype="fp32", workload=Workload())


def test_further_prompt_lengths() -> None:
    table = record_cost_table(
        SMOL, Machine().measure, target=CPU, dtype="fp32", workload=Workload(), prompt_lengths=(128, 512), rounds=1
    )
    assert table.prompt_lengths == (128, 512)
    assert len(table.measurements) == 24
    assert table.workload == Workload()


def test_memory_is_weights_cache_and_logits() -> None:
    base = replace(SMOL, tied_embeddings=True)
    model = dense((9, 3, 1536), (0, 0, 1536), base=base)
    workload = Workload(prompt_tokens=128, generate_tokens=72, batch=1)
    cache = 200 * 2 * 3 * 64
    logits = 128 * 49152
    expected = 4 * (model.num_params + cache + logits) / 2**20
    assert predict_memory_mb(model, dtype="fp32", workload=workload) == pytest.approx(expected)
    assert predict_memory_mb(model, dtype="fp16", workload=workload) == pytest.approx(expected / 2)
    embedding = 49152 * 576
    int4 = (0.625 * (model.num_params - embedding) + 4 * (embedding + cache + logits)) / 2**20
    assert predict_memory_mb(model, dtype="int4", workload=workload) == pytest.approx(int4)
