"""A manifest to test with."""

from __future__ import annotations

from typing import Any

from amoeba_export.artifact import LatencyRecord, LayerCounts, Manifest, ShapeRecord, VerificationRecord
from amoeba_export.ir import InputId, Workload


def manifest(**changes: Any) -> Manifest:
    settings: dict[str, Any] = {
        "model": "demo",
        "shape": ShapeRecord(
            depth=1, width=0.5, layers=(LayerCounts(source_layer=3, query_heads=3, kv_heads=1, ffn=48),)
        ),
        "dtype": "fp32",
        "latency": LatencyRecord(
            metric="decode",
            budget_ms=20.0,
            predicted_ms=18.5,
            measured_ms={"p50": 19.0, "p90": 21.0},
            source="measured",
            target="cpu",
            workload=Workload(),
            uncertainty=0.05,
            device={"threads": "2"},
        ),
        "quality": {"loss": 3.25},
        "verification": VerificationRecord(max_abs_diff=1e-5, max_rel_diff=1e-6, greedy_tokens_equal=True),
        "inputs": (InputId(role="model", id="demo", sha256="ab" * 32),),
        "tool": {"amoeba": "0.1.0"},
        "dims": {
            "family": "llama",
            "num_layers": 4,
            "hidden_size": 96,
            "num_heads": 6,
            "num_kv_heads": 3,
            "head_dim": 32,
            "ffn_size": 96,
            "vocab_size": 128,
            "max_positions": 256,
            "norm_eps": 1e-5,
            "rope_theta": 10000.0,
        },
    }
    return Manifest(**(settings | changes))
