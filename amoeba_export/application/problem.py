"""What a session asks of a search, and what the whole model is worth in the same terms."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import numpy as np

from amoeba_export.application.recipes import deepened
from amoeba_export.application.session import Session
from amoeba_export.application.wholes import Whole
from amoeba_export.formats.sizes import weight_bytes
from amoeba_export.ir import Architecture, DenseArchitecture, Importance, Latency, Metric, Shape, Strategy
from amoeba_export.ir.derive import CutRules, derive_plan
from amoeba_export.ir.dtype import AUTO
from amoeba_export.profile import predict_memory_mb
from amoeba_export.search import Problem, quality_surface
from amoeba_export.search.space import CALIBRATE_SMALLER

LEAST_NOISE = 0.005
"""Of a latency that was measured in another run, where its rounds scatter less or were not kept."""


class Known:
    """The predictor of the full model alone: what was measured of it in another run."""

    def __init__(self, latency: Latency) -> None:
        self._latency = latency

    def predict(self, dense: DenseArchitecture, metric: Metric = "decode", percentile: int = 50) -> tuple[float, float]:
        """See `search.predict.Predictor`."""
        timing = self._latency.prefill if metric == "prefill" else self._latency.decode
        return self._latency.of(metric, percentile), timing.noise or LEAST_NOISE


def problem_of(session: Session, strategy: Strategy) -> Problem:
    """What `session` wants a search to choose, in its dtype."""
    settings, dtype = session.settings, session.dtype
    is_one_of_several = settings.request.dtype in (None, AUTO) and len(session.target.dtypes) > 1
    return Problem(
        strategy=strategy,
        architecture=session.architecture,
        budgets=settings.budgets,
        rules=settings.rules(session.supernet, dtype),
        head_tokens=session.supernet.head_tokens,
        memory_mb=partial(memory_mb, session),
        memory_limit_mb=settings.memory_limit_mb,
        dtype=dtype if is_one_of_several else None,
        runtime=session.target.limits,
        runtime_dtype=dtype,
        smaller=smaller_than_known(session),
    )


def smaller_than_known(session: Session) -> str:
    """What to do for smaller shapes than those that a search in `session` chooses from."""
    if any(item.role == "quality" for item in session.supernet.inputs):
        return "measure smaller shapes, too, with 'amoeba evaluate --grid' and --depths or --widths"
    return CALIBRATE_SMALLER


def memory_mb(session: Session, dense: DenseArchitecture) -> float:
    """What `dense` occupies in the session's dtype while it runs, in MiB."""
    settings, dtype = session.settings, session.dtype
    weights = weight_bytes(dense, settings.formats, dtype).total
    return predict_memory_mb(
        dense, weight_bytes=weights, dtype=dtype, workload=settings.workload, formats=settings.formats
    )


def whole_quality(session: Session, whole: Whole) -> tuple[str, float] | None:
    """Metric and value of the full model before rounding: calibrated, or else measured on a text; None if neither."""
    strategy = session.supernet.strategy
    if strategy is not None and strategy.quality:
        surface = quality_surface(strategy)
        known = surface.at(session.architecture.num_layers, 1.0)
        return (surface.metric, known.value) if known else None
    loss = whole.rounding.loss if whole.rounding else None
    return None if loss is None else ("loss", loss)


def whole_strategy(session: Session, whole: Whole) -> Strategy:
    """A strategy that knows the full model alone."""
    architecture = session.architecture
    full = (1,) * architecture.num_layers
    quality = whole_quality(session, whole)
    metric, values = (quality[0], {Shape(architecture.num_layers, 1.0): quality[1]}) if quality else ("loss", {})
    known: dict[str, Any] = {
        "depth": {0: full},
        "depth_metric": {},
        "importance": _no_importance(architecture),
        "widths": {},
        "quality": values,
        "quality_metric": metric,
    }
    given = session.supernet.strategy
    if given is not None:
        return dataclasses.replace(given, **known)
    return Strategy(
        model_id=session.supernet.identity,
        num_layers=architecture.num_layers,
        num_heads=architecture.num_heads,
        num_kv_heads=architecture.num_kv_heads,
        head_dim=architecture.head_dim,
        ffn_size=architecture.ffn_size,
        **known,
    )


def _no_importance(architecture: Architecture) -> Importance:
    """Where all is kept, nothing is compared; and nothing is compensated."""
    layers, heads, ffn = architecture.num_layers, architecture.num_heads, architecture.ffn_size
    return Importance(
        heads_LN=np.zeros((layers, heads)),
        ffn_LF=np.zeros((layers, ffn)),
        o_mean_LQ=np.zeros((layers, heads * architecture.head_dim), dtype=np.float32),
        down_mean_LF=np.zeros((layers, ffn), dtype=np.float32),
        metric="WIFV",
    )


def smallest_known(session: Session) -> DenseArchitecture | None:
    """The smallest subnet that a deeper calibration would know; None where the strategy was given."""
    recipe, architecture = session.settings.recipe, session.architecture
    if recipe is None:
        return None
    recipe = deepened(recipe, architecture.num_layers)
    depth = architecture.num_layers - recipe.depth.removed_of(architecture.num_layers)
    width = min(recipe.quality.widths)
    shape = Shape(architecture.num_layers, width)
    plan = derive_plan(session.strategy, architecture, shape, CutRules(align=session.settings.align))
    return DenseArchitecture(base=architecture, layers=plan.dense(architecture).layers[:depth])
