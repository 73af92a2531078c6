"""Made-up strategies whose every figure is known."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np

from amoeba_export.ir import Architecture, Budget, FixedWidth, Importance, Shape, Strategy, SubnetPlan, Supernet
from amoeba_export.ir.derive import CutRules
from amoeba_export.load import load_supernet, write_strategy
from amoeba_export.search import Predictor, Problem, SearchResult, Seen, search_plan
from tests.profile.machines import SMOL

DEPTHS = (30, 27, 24, 20)
WIDTHS = (1.0, 0.875, 0.75, 0.5)


def loss(shape: Shape) -> float:
    """A smooth truth: worse with every layer and neuron that goes, and faster so towards the end."""
    return 2.5 + 0.9 * (1 - shape.depth / 30) ** 1.5 * 8 + 3.0 * (1 - shape.width) ** 1.6


def depth_orders(num_layers: int, most_removed: int) -> dict[int, tuple[int, ...]]:
    """Layers are removed from the middle outwards."""
    order = sorted(range(1, num_layers - 1), key=lambda layer: abs(layer - num_layers * 0.6))
    return {
        removed: tuple(int(layer not in order[:removed]) for layer in range(num_layers))
        for removed in range(most_removed + 1)
    }


def own_strategy(
    architecture: Architecture = SMOL,
    *,
    depths: Sequence[int] = DEPTHS,
    widths: Sequence[float] = WIDTHS,
    seed: int = 0,
    quality: Mapping[Shape, float] | None = None,
) -> Strategy:
    """A calibrated strategy with heavy-tailed importances, as FLAP finds them."""
    rng = np.random.default_rng(seed)
    layers, heads, ffn = architecture.num_layers, architecture.num_heads, architecture.ffn_size
    return Strategy(
        model_id="model",
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=architecture.num_kv_heads,
        head_dim=architecture.head_dim,
        ffn_size=ffn,
        depth=depth_orders(layers, layers - min(depths)),
        importance=Importance(
            heads_LN=_standardised(rng.lognormal(0, 1, (layers, heads))),
            ffn_LF=_standardised(rng.lognormal(0, 1 + rng.random((layers, 1)), (layers, ffn))),
            o_mean_LQ=np.zeros((layers, heads * architecture.head_dim), dtype=np.float32),
            down_mean_LF=np.zeros((layers, ffn), dtype=np.float32),
            metric="WIFV",
        ),
        quality=quality if quality is not None else {Shape(d, w): loss(Shape(d, w)) for d in depths for w in widths},
        identity="strategy",
    )


def graded_strategy(supernet: Supernet, *, depths: Sequence[int] = (4, 3, 2)) -> Strategy:
    """Of a tiny model: widths 1 to a half, and losses that are worse with everything that goes."""
    widths = (1.0, 0.75, 0.5)
    quality = {Shape(depth, width): 10 - depth - 2 * width for depth in depths for width in widths}
    made = own_strategy(supernet.architecture, depths=depths, widths=widths, quality=quality)
    return dataclasses.replace(made, model_id=supernet.identity)


def write_graded(model: Path, path: Path, *, cache_dir: Path | None = None) -> Path:
    """The file of `graded_strategy`."""
    write_strategy(graded_strategy(load_supernet(str(model), cache_dir=cache_dir)), path)
    return path


def imported_strategy(architecture: Architecture = SMOL, *, removed: int = 10) -> Strategy:
    """An upstream import: masks of two widths, no importances, no quality."""
    layers, heads, ffn = architecture.num_layers, architecture.num_heads, architecture.ffn_size
    bias = np.zeros((layers, architecture.hidden_size), dtype=np.float32)
    widths = {}
    for width in (0.75, 0.5):
        heads_LN = np.zeros((layers, heads), dtype=bool)
        heads_LN[:, : architecture.heads_per_kv * round(architecture.num_kv_heads * width)] = True
        ffn_LF = np.zeros((layers, ffn), dtype=bool)
        ffn_LF[:, : int(ffn * width)] = True
        widths[width] = FixedWidth(heads_LN=heads_LN, ffn_LF=ffn_LF, o_bias_LD=bias, down_bias_LD=bias)
    return Strategy(
        model_id=None,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=architecture.num_kv_heads,
        head_dim=architecture.head_dim,
        ffn_size=ffn,
        depth=depth_orders(layers, removed),
        widths=widths,
    )


def searched(
    strategy: Strategy, architecture: Architecture, predictor: Predictor, budgets: Sequence[Budget], **settings: Any
) -> SearchResult:
    """`search_plan` with settings of its problem and of what was seen, mixed. `full` is of the precision searched."""
    seen = {one.name: settings.pop(one.name) for one in fields(Seen) if one.name in settings}
    if full := seen.get("full"):
        uncut = SubnetPlan.full(architecture).dense(architecture)
        seen["measured"] = ((uncut, full), *seen.get("measured", ()))
    rules = CutRules(**{one.name: settings.pop(one.name) for one in fields(CutRules) if one.name in settings})
    problem = Problem(strategy=strategy, architecture=architecture, budgets=tuple(budgets), rules=rules, **settings)
    return search_plan(problem, predictor, Seen(**seen))


def _standardised(scores: np.ndarray) -> np.ndarray:
    return (scores - scores.mean(axis=1, keepdims=True)) / scores.std(axis=1, keepdims=True)
