"""How well the cost model predicts shapes that it has not seen.

    python benchmarks/cost_model.py [--target cpu] [--model demo] [--dtype fp32] [--rounds 3] [--json FILE]

Twelve graphs are chosen by `design_graphs`, twelve others are drawn at random: half of them uniform, half with other
heads and neurons in every layer. All are measured in one interleaved run with random weights; the table is fitted to
the first twelve and asked about the others. Where decoding is no sum of its parts, three more graphs are measured for
the table, as `amoeba profile` does. Reported: median and largest relative error of decode and of prefill, the share of
errors inside the table's own error bars, and the time that the twelve graphs took.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from pathlib import Path

import numpy as np

from amoeba_export.backends import Subject, measure_latency
from amoeba_export.backends.targets import read_target
from amoeba_export.ir import Architecture, DenseArchitecture, Latency, LayerDims, Workload
from amoeba_export.load import load_supernet
from amoeba_export.profile import CostTable, design_graphs, fit_cost_table, write_table
from amoeba_export.profile.design import graphs_between
from amoeba_export.profile.knee import is_bent
from amoeba_export.profile.record import BETWEEN

NUM_HELD_OUT = 12


def held_out(architecture: Architecture, *, seed: int, min_depth: int, align: int) -> list[DenseArchitecture]:
    """Random shapes: every other one is uniform."""
    rng = np.random.default_rng(seed)
    shapes = []
    for i in range(NUM_HELD_OUT):
        depth = int(rng.integers(min_depth, architecture.num_layers + 1))
        uniform = i % 2 == 0
        layers = [_layer(architecture, rng, align, least_groups=1 if uniform else 0) for _ in range(depth)]
        shapes.append(DenseArchitecture(base=architecture, layers=tuple([layers[0]] * depth if uniform else layers)))
    return shapes


def _layer(architecture: Architecture, rng: np.random.Generator, align: int, *, least_groups: int) -> LayerDims:
    groups = int(rng.integers(least_groups, architecture.num_kv_heads + 1))
    ffn_size = min(architecture.ffn_size, align * int(rng.integers(8, architecture.ffn_size // align + 1)))
    return LayerDims(
        num_heads=groups * architecture.heads_per_kv,
        num_kv_heads=groups,
        ffn_size=ffn_size,
        qkv_bias=architecture.qkv_bias,
        o_bias=architecture.o_bias or groups < architecture.num_kv_heads,
        gate_up_bias=architecture.mlp_bias,
        down_bias=architecture.mlp_bias or ffn_size < architecture.ffn_size,
    )


def report(table: CostTable, shapes: list[DenseArchitecture], latencies: list[Latency]) -> dict[str, object]:
    """The figures of one run."""
    figures: dict[str, object] = {}
    for metric in ("decode", "prefill"):
        errors, inside = [], []
        for dense, latency in zip(shapes, latencies, strict=True):
            predicted_ms, half_width = table.predict(dense, metric)
            errors.append(predicted_ms / latency.of(metric) - 1)
            inside.append(abs(errors[-1]) <= half_width)
            print(
                f"{metric:8} depth {len(dense.layers):3} {'uniform' if dense.is_uniform else 'mixed':8}"
                f"{latency.of(metric):9.2f} ms measured {predicted_ms:9.2f} ms predicted"
                f" {100 * errors[-1]:+6.1f} % (give or take {100 * half_width:.1f} %)"
            )
        fit = table.fits[f"{metric}_p50"]
        figures[metric] = {
            "median_error": float(np.median(np.abs(errors))),
            "largest_error": float(np.max(np.abs(errors))),
            "inside_error_bars": float(np.mean(inside)),
            "leave_one_out_median": fit.median_error,
            "coefficients_ms": dict(zip(fit.columns, fit.coefficients_ms, strict=True)),
        }
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--target", default="cpu")
    parser.add_argument("--model", default="demo")
    parser.add_argument("--dtype", default=None)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--min-depth", type=int, default=None)
    parser.add_argument("--table", type=Path, help="write the fitted cost table there")
    parser.add_argument("--json", type=Path, help="write the figures and all measurements there")
    settings = parser.parse_args()

    target = read_target(settings.target)
    dtype = settings.dtype or target.dtype
    architecture = load_supernet(settings.model).architecture
    workload = Workload(prompt_tokens=settings.prompt)
    min_depth = settings.min_depth or architecture.num_layers // 2
    graphs = design_graphs(architecture, min_depth=min_depth, align=target.align)
    others = held_out(architecture, seed=settings.seed, min_depth=min_depth, align=target.align)
    start = time.perf_counter()
    results = measure_latency(
        [Subject(dense=dense, dtype=dtype, label=f"graph {i}") for i, dense in enumerate([*graphs, *others])],
        workload,
        target=target,
        rounds=settings.rounds,
    )
    seconds = time.perf_counter() - start
    measured = []
    for dense, result in zip([*graphs, *others], results, strict=True):
        if not isinstance(result, Latency):
            raise result
        measured.append((dense, result))
    for_table = measured[: len(graphs)]
    table = fit_cost_table(for_table, target=target.name, dtype=dtype)
    if is_bent(table.fits["decode_p50"]):
        between = graphs_between(architecture, graphs, num_graphs=BETWEEN, min_depth=min_depth, align=target.align)
        again = [Subject(dense=dense, dtype=dtype, label="a graph between") for dense in between]
        more = measure_latency(again, workload, target=target, rounds=settings.rounds)
        for_table += [(one, got) for one, got in zip(between, more, strict=True) if isinstance(got, Latency)]
        table = fit_cost_table(for_table, target=target.name, dtype=dtype)
        knee = table.fits["decode_p50"].knee
        print(f"decoding is no sum: {len(between)} more graphs, a knee at {knee} million weights")
    figures = report(table, others, [latency for _, latency in measured[len(graphs) :]])
    figures["seconds_for_all"] = seconds
    figures["seconds_for_the_table"] = seconds * len(graphs) / len(results)
    print(json.dumps(figures, indent=2))
    if settings.table:
        write_table(table, settings.table)
    if settings.json:
        rows = [
            {
                "layers": [[one.num_heads, one.num_kv_heads, one.ffn_size] for one in dense.layers],
                "decode": dataclasses.asdict(latency.decode),
                "prefill": dataclasses.asdict(latency.prefill),
            }
            for dense, latency in measured
        ]
        settings.json.write_text(json.dumps({"figures": figures, "measured": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
