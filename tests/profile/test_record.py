from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import pytest

from amoeba_export.errors import TargetError
from amoeba_export.ir import DenseArchitecture, Latency, Target, Workload
from amoeba_export.profile import Profiling, predict_memory_mb, record_cost_table
from amoeba_export.profile.record import Measure
from amoeba_export.profile.rounds import median_polish
from tests.listener import Listener
from tests.profile.machines import SMOL, Machine, dense

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


def _each(measure: Callable[[DenseArchitecture], Latency]) -> Measure:
    """A backend that measures one graph at a time and goes on when one fails."""

    def one(model: DenseArchitecture, workload: Workload) -> Latency | TargetError:
        try:
            return replace(measure(model), workload=workload)
        except TargetError as error:
            return error

    return lambda graphs, workload: [one(graph, workload) for graph in graphs]


def _slower(factor: float) -> Machine:
    machine = Machine()
    for name in ("base_ms", "attention_ms", "ffn_ms", "head_ms", "kv_head_ms", "kv_token_ms", "neuron_ms"):
        setattr(machine, name, factor * getattr(machine, name))
    return machine


def test_a_suspect_is_measured_again() -> None:
    calls: list[DenseArchitecture] = []

    def measure(model: DenseArchitecture) -> Latency:
        calls.append(model)
        return (_slower(2) if len(calls) == 6 else Machine()).measure(model)

    table = record_cost_table(SMOL, _each(measure), Profiling(target=CPU, dtype="fp32", workload=Workload()))
    assert len(calls) > 12
    assert calls[5] in calls[12:]
    assert table.suspects == ()
    assert table.predict(calls[5])[0] == pytest.approx(Machine().measure(calls[5]).decode.p50_ms, rel=1e-9)


def test_graphs_that_do_not_run_are_left_out() -> None:
    def measure(model: DenseArchitecture) -> Latency:
        if len(model.layers) == 30 and all(layer == SMOL.layer_dims for layer in model.layers):
            raise TargetError("The full model does not fit into the memory of the device.")
        return Machine().measure(model)

    table = record_cost_table(SMOL, _each(measure), Profiling(target=CPU, dtype="fp32", workload=Workload()))
    assert len(table.measurements) == 11


def test_a_target_that_measures_nothing_says_why() -> None:
    def measure(model: DenseArchitecture) -> Latency:
        raise TargetError("The device is gone.")

    with pytest.raises(TargetError, match=r"The device is gone\."):
        record_cost_table(SMOL, _each(measure), Profiling(target=CPU, dtype="fp32", workload=Workload()))


def test_further_prompt_lengths() -> None:
    def measure(graphs: Sequence[DenseArchitecture], workload: Workload) -> list[Latency | TargetError]:
        return [Machine().measure(graph, workload) for graph in graphs]

    profiling = Profiling(target=CPU, dtype="fp32", workload=Workload(), prompt_lengths=(128, 512))
    table = record_cost_table(SMOL, measure, profiling)
    assert table.prompt_lengths == (128, 512)
    assert len(table.measurements) == 24
    assert table.workload == Workload()


def test_memory_is_weights_cache_and_logits() -> None:
    base = replace(SMOL, tied_embeddings=True)
    model = dense((9, 3, 1536), (0, 0, 1536), base=base)
    workload = Workload(prompt_tokens=128, generate_tokens=72, batch=1)
    cache = 200 * 2 * 3 * 64
    logits = 128 * 49152
    for dtype, number in (("fp32", 4), ("fp16", 2), ("int4", 4)):
        expected = (1000 + number * (cache + logits)) / 2**20
        found = predict_memory_mb(model, weight_bytes=1000, dtype=dtype, workload=workload)
        assert found == pytest.approx(expected)


def test_graphs_that_scatter_are_measured_again_together_and_a_loud_machine_is_named() -> None:
    calls: list[int] = []
    listener = Listener()

    def measure(graphs: Sequence[DenseArchitecture], workload: Workload) -> list[Latency | TargetError]:
        calls.append(len(graphs))
        return [_scattering(Machine().measure(graph), 0.4 if i % 4 == 1 else 0.06) for i, graph in enumerate(graphs)]

    table = record_cost_table(
        SMOL, measure, Profiling(target=CPU, dtype="fp32", workload=Workload()), progress=listener
    )
    assert calls == [12, 3]
    assert table.noise == 0.06
    assert listener.notes[:-1] == ["Measuring 3 of 12 graphs again: they scatter, or do not fit the others."]
    assert listener.warnings == [
        "'cpu' is not quiet: its measurements scatter by 6 %. Close other programs and profile it again for a better "
        "cost table."
    ]


def _scattering(latency: Latency, noise: float) -> Latency:
    return replace(latency, decode=replace(latency.decode, noise=noise))
