"""How a strategy is shown."""

from __future__ import annotations

from typing import Any

from amoeba_export.ir import Strategy

LONGEST = 120
"""Characters of a provenance entry that people are shown."""


def strategy_facts(strategy: Strategy) -> dict[str, str]:
    """What it knows, for people."""
    rows = {
        "model": f"{strategy.num_layers} layers, {strategy.num_heads} query heads, {strategy.num_kv_heads} KV heads, "
        f"{strategy.ffn_size} FFN units",
        "model id": strategy.model_id or "unknown (imported)",
        "depths": f"{strategy.min_depth} to {strategy.num_layers} layers, chosen by {strategy.metric}",
    }
    if strategy.importance is not None:
        rows["widths"] = f"any (importances by {strategy.importance.metric})"
    else:
        rows["widths"] = ", ".join(f"{width:g}" for width in strategy.widths) or "1"
    if strategy.quality:
        full = strategy.quality.get(max(strategy.quality))
        rows["quality"] = (
            f"{strategy.quality_metric} of {len(strategy.quality)} shapes, {min(strategy.quality)} to "
            f"{max(strategy.quality)} ({full:.4g})"
        )
    rows |= {name: value for name, value in strategy.provenance.items() if len(value) <= LONGEST}  # JSON has them all
    if strategy.identity:
        rows["sha256"] = strategy.identity
    return rows


def strategy_to_json(strategy: Strategy) -> dict[str, Any]:
    """The same for programs, with the layers that every depth keeps and the quality of every shape."""
    return {
        "kind": "strategy",
        "model_id": strategy.model_id,
        "sha256": strategy.identity,
        "num_layers": strategy.num_layers,
        "num_heads": strategy.num_heads,
        "num_kv_heads": strategy.num_kv_heads,
        "head_dim": strategy.head_dim,
        "ffn_size": strategy.ffn_size,
        "metric": strategy.metric,
        "depths": [
            {
                "depth": sum(kept),
                "metric": strategy.depth_metric.get(removed),
                "layers": [i for i, keep in enumerate(kept) if keep],
            }
            for removed, kept in sorted(strategy.depth.items())
        ],
        "importance": strategy.importance.metric if strategy.importance else None,
        "widths": list(strategy.widths),
        "quality_metric": strategy.quality_metric,
        "quality": {str(shape): value for shape, value in sorted(strategy.quality.items(), reverse=True)},
        "provenance": dict(strategy.provenance),
    }
