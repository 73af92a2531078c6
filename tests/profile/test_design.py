from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from amoeba_export.ir import Architecture
from amoeba_export.profile import design_graphs
from amoeba_export.profile.features import Counts, counts_of, dims_of, features
from tests.profile.machines import SMOL, Machine

MHA = replace(SMOL, num_kv_heads=9)
TINY = replace(SMOL, num_layers=4, num_heads=6, hidden_size=96, head_dim=32, ffn_size=96, vocab_size=128)


@pytest.mark.parametrize(("architecture", "num_terms"), [(SMOL, 6), (MHA, 5), (TINY, 6)], ids=["gqa", "mha", "tiny"])
def test_twelve_distinct_graphs_tell_every_term_apart(architecture: Architecture, num_terms: int) -> None:
    graphs = design_graphs(architecture)
    assert len(graphs) == 12
    assert len({counts_of(graph) for graph in graphs}) == 12
    rows = [features(counts_of(graph), dims_of(architecture), "decode", 128) for graph in graphs]
    x = np.array([[row[name] for name in ("base", "attention_blocks", "ffn_blocks", "query_heads", "kv_heads", "ffn")]
                  for row in rows])  # fmt: skip
    assert np.linalg.matrix_rank(x) == num_terms


def test_the_uncut_model_is_first_and_has_no_compensation_bias() -> None:
    first, *others = design_graphs(SMOL)
    assert counts_of(first) == (Counts(9, 3, 1536),) * 30
    assert not first.layers[0].o_bias
    assert not first.layers[0].down_bias
    assert [graph.num_params for graph in others] == sorted((graph.num_params for graph in others), reverse=True)
    assert all(layer.o_bias == (layer.num_heads < 9) for graph in others for layer in graph.layers)


def test_graphs_span_the_space_and_keep_to_it() -> None:
    graphs = design_graphs(SMOL, min_depth=20, min_width=0.5, align=64)
    depths = {len(graph.layers) for graph in graphs}
    assert min(depths) == 20
    assert max(depths) == 30
    neurons = {layer.ffn_size for graph in graphs for layer in graph.layers}
    assert min(neurons - {0}) == 768
    assert all(count % 64 == 0 for count in neurons)
    assert any(not graph.is_uniform for graph in graphs)
    assert all(layer.num_heads % max(1, layer.num_kv_heads) == 0 for graph in graphs for layer in graph.layers)


def test_middle_graphs_are_always_there() -> None:
    """Corners alone cannot show that a machine is not additive."""
    assert {counts_of(graph) for graph in design_graphs(SMOL)} >= {
        (Counts(3, 1, 960),) * 22,
        (Counts(9, 3, 960),) * 19,
    }


def test_a_design_beats_random_choices() -> None:
    machine = Machine()

    def log_det(graphs: list) -> float:  # type: ignore[type-arg]
        rows = [features(counts_of(graph), dims_of(SMOL), "decode", 128) for graph in graphs]
        x = np.array([list(row.values())[:6] for row in rows])
        x /= np.array([[machine.decode_ms(graph, 128)] for graph in graphs])
        return float(np.linalg.slogdet(x.T @ x)[1])

    pool = design_graphs(SMOL, num_graphs=60)
    rng = np.random.default_rng(0)
    random = [log_det([pool[i] for i in rng.choice(len(pool), 12, replace=False)]) for _ in range(200)]
    assert log_det(design_graphs(SMOL)) > max(random)
