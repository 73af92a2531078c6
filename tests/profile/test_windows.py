"""Layers with a window cost what lies in the window: in the estimate, the cost table, memory and the search."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest

from amoeba_export.backends.analytic import work_of
from amoeba_export.errors import DamagedFile, WrongModel
from amoeba_export.formats.sizes import WeightBytes
from amoeba_export.ir import Architecture, DenseArchitecture, Importance, Latency, Timing, Workload
from amoeba_export.ir.family import LayerKind, Rope
from amoeba_export.profile import design_graphs, fit_cost_table, predict_memory_mb
from amoeba_export.profile.features import Counts, counts_of, dims_of, features
from amoeba_export.profile.table_file import table_from_json, table_to_json
from amoeba_export.search.importance import Retained
from amoeba_export.search.layers import _Constraint, _LayerChoices, _solutions
from amoeba_export.search.predict import counts_of as counts_of_search
from tests.profile.machines import SMOL

_ROPE = Rope(theta=1e4, scaling=None, dims=64)
LOCAL = LayerKind(name="sliding_attention", window=512, rope=_ROPE)
GLOBAL = LayerKind(name="full_attention", rope=_ROPE)
MIXED = dataclasses.replace(SMOL, num_layers=6, kinds=(LOCAL, GLOBAL), kind_of_layer=(0, 0, 1, 0, 0, 1))
PLAIN = dataclasses.replace(SMOL, num_layers=6)


def decode_work(base: Architecture, tokens: int) -> tuple[float, float]:
    """Bytes of the cache, and flops."""
    weights = WeightBytes(layers=0, head=0, embedding=0)
    work = work_of(base.uncut, 1, Workload(prompt_tokens=tokens), weights=weights)
    return work.memory_bytes, work.flops


def test_a_step_reads_and_computes_what_windows_hold() -> None:
    """Per cached token 2 x 2 bytes for each of 3 KV heads of 64, and 4 x 64 flops for each of 9 heads."""
    (mixed, mixed_flops), (plain, plain_flops) = decode_work(MIXED, 2048), decode_work(PLAIN, 2048)
    assert plain == 4 * 3 * 64 * 6 * 2048
    assert mixed == 4 * 3 * 64 * (4 * 512 + 2 * 2048)
    assert plain_flops - mixed_flops == 4 * 64 * 9 * 4 * (2048 - 512)
    assert decode_work(MIXED, 512) == decode_work(PLAIN, 512)


def test_features_count_the_tokens_that_are_seen() -> None:
    counts, dims = counts_of(MIXED.uncut), dims_of(MIXED)
    assert counts == tuple(Counts(9, 3, 1536, 0 if kind else 512) for kind in MIXED.kind_of_layer)
    assert dims == {**dims_of(PLAIN), "layers_of_window_512": 4}
    decode = features(counts, dims, "decode", 2048)
    assert decode["kv_cache"] == decode["scores"] == 4 * 4 + 2 * 16
    prefill = features(counts, dims, "prefill", 2048)
    assert prefill["scores"] == (4 * 4 + 2 * 16) * 16
    assert features(counts, dims, "decode", 256) == features(counts_of(PLAIN.uncut), dims, "decode", 256)


def test_memory_is_that_of_windows_where_a_runtime_drops_the_rest() -> None:
    workload = Workload(prompt_tokens=2048, generate_tokens=128)

    def cache(base: Architecture, *formats: str) -> float:
        def found(dense: DenseArchitecture) -> float:
            return predict_memory_mb(dense, weight_bytes=0, dtype="fp16", workload=workload, formats=formats) * 2**20

        gone = dataclasses.replace(base.layer_dims, num_kv_heads=0)
        layers = tuple(dataclasses.replace(gone, kind=layer.kind) for layer in base.uncut.layers)
        return found(base.uncut) - found(DenseArchitecture(base=base, layers=layers))

    per_token = 2 * 2 * 3 * 64
    assert cache(PLAIN) == pytest.approx(per_token * 6 * 2176)
    assert cache(MIXED, "gguf", "safetensors") == pytest.approx(per_token * (4 * (512 + 512) + 2 * 2176))
    assert cache(MIXED, "onnx") == pytest.approx(per_token * 6 * 2176)


def test_a_table_knows_windows_and_survives_its_file() -> None:
    def latency(dense: DenseArchitecture, tokens: int) -> Latency:
        counts, dims = counts_of(dense), dims_of(MIXED)
        decode = sum(features(counts, dims, "decode", tokens).values())
        prefill = sum(features(counts, dims, "prefill", tokens).values())
        return Latency(
            decode=Timing(p50_ms=decode, p90_ms=decode, num_samples=1),
            prefill=Timing(p50_ms=prefill, p90_ms=prefill, num_samples=1),
            source="measured",
            workload=Workload(prompt_tokens=tokens),
            device={},
        )

    graphs = design_graphs(MIXED)
    assert {layer.kind for graph in graphs for layer in graph.layers} == {0, 1}
    rows = [(graph, latency(graph, tokens)) for graph in graphs for tokens in (256, 2048)]
    table = fit_cost_table(rows, target="t", dtype="fp16")
    assert table_from_json(json.loads(json.dumps(table_to_json(table)))) == table
    whole = DenseArchitecture(base=MIXED, layers=tuple(MIXED.uncut.layers[i] for i in (2, 5)))
    local = DenseArchitecture(base=MIXED, layers=tuple(MIXED.uncut.layers[i] for i in (0, 1)))
    times = [table.predict(dense, workload=Workload(prompt_tokens=2048))[0] for dense in (whole, local)]
    # of two layers: kv_cache and scores
    assert times[0] - times[1] == pytest.approx(2 * 2 * (2048 - 512) / 128, rel=0.02)
    with pytest.raises(WrongModel, match="its layers_of_window_512 is 4, not None"):
        table.predict(PLAIN.uncut)
    damaged = table_to_json(table)
    damaged["measurements"][0]["layers"][0] = [9, 3]
    with pytest.raises(DamagedFile, match="is not heads, KV heads, neurons and how often"):
        table_from_json(damaged)


def test_a_search_keeps_heads_where_they_are_cheap() -> None:
    """All heads are worth the same, and those with a window cost a quarter: heads of layers without one go first."""

    def cost(dense: DenseArchitecture) -> float:
        return 1 + sum(layer.num_kv_heads * dense.kind(layer).seen(2048) for layer in dense.layers)

    options = _LayerChoices(MIXED, 1, "none")
    costs = options.costs(cost, range(6))
    whole_layer = options.attention.index((9, 3))
    assert [float(added[whole_layer]) for added in costs.attention] == [
        3 * (2048 if kind else 512) for kind in MIXED.kind_of_layer
    ]
    importance = Importance(
        heads_LN=np.ones((6, 9)),
        ffn_LF=np.ones((6, 1536)),
        o_mean_LQ=np.zeros((6, 576), dtype=np.float32),
        down_mean_LF=np.zeros((6, 1536), dtype=np.float32),
        metric="WIFV",
    )
    constraint = _Constraint(cost, 1 + 3 * (4 * 512 + 2048))
    layers, _ = next(iter(_solutions(range(6), Retained.of(importance, MIXED), options, [constraint])))
    kept = [one.num_kv_heads for one in layers]
    assert [kept[i] for i in (0, 1, 3, 4)] == [3] * 4
    assert kept[2] + kept[5] < 6
    assert [layer.kind for layer in options.dense(layers).layers] == list(MIXED.kind_of_layer)


def test_cuts_that_attend_differently_are_two_to_a_search() -> None:
    pairs = [tuple(MIXED.uncut.layers[i] for i in kept) for kept in ((0, 2), (0, 1))]
    one, other = (counts_of_search(DenseArchitecture(base=MIXED, layers=layers)) for layers in pairs)
    assert one != other
