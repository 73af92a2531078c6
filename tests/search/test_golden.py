"""A search decision from a recorded table is the same, byte for byte, on every machine."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from amoeba_export.ir import Budget, Importance, Strategy
from amoeba_export.profile import predict_memory_mb, read_table
from amoeba_export.search import Space
from tests.profile.machines import SMOL
from tests.search.strategies import own_strategy, searched

GOLDEN = Path(__file__).parent / "golden"
MODEL = replace(SMOL, num_layers=6, num_heads=6, hidden_size=96, head_dim=16, ffn_size=64, vocab_size=512)


def strategy() -> Strategy:
    """Importances by whole-number arithmetic: no random stream that a new numpy might change."""
    layers, heads, ffn = MODEL.num_layers, MODEL.num_heads, MODEL.ffn_size
    heads_LN = np.array([[(7919 * (layer + 3) * (head + 5)) % 1009 / 1009 for head in range(heads)]
                         for layer in range(layers)])  # fmt: skip
    ffn_LF = np.array([[((6007 * (layer + 2) * (neuron + 11)) % 1013 / 1013) ** 4 for neuron in range(ffn)]
                       for layer in range(layers)])  # fmt: skip
    importance = Importance(
        heads_LN=heads_LN,
        ffn_LF=ffn_LF,
        o_mean_LQ=np.zeros((layers, heads * MODEL.head_dim), dtype=np.float32),
        down_mean_LF=np.zeros((layers, ffn), dtype=np.float32),
        metric="WIFV",
    )
    return replace(own_strategy(MODEL, depths=(6, 5, 3)), importance=importance)


def decision(space: Space) -> str:
    """The limits, the choice and its plan, and what came next, as JSON."""
    table = read_table(GOLDEN / "table.json")
    result = searched(
        strategy(),
        MODEL,
        table,
        [Budget.parse("70%"), Budget.parse("80%", metric="prefill", percentile=90)],
        space=space,
        align=4,
        memory_mb=lambda model: predict_memory_mb(
            model, weight_bytes=4 * model.num_params, dtype="fp32", workload=table.workload
        ),
        memory_limit_mb=100.0,
    )
    answer = result.to_json()
    answer["candidates"] = answer["candidates"][:5]
    answer["pareto"] = [candidate.to_json()["shape"] for candidate in result.pareto]
    answer["plan"] = result.best.make_plan().to_json()
    return json.dumps(answer, indent=1) + "\n"


@pytest.mark.parametrize("space", ["grid", "layers"])
def test_the_decision_is_the_recorded_one(space: Space) -> None:
    assert decision(space) == (GOLDEN / f"{space}.json").read_text(encoding="utf-8")
