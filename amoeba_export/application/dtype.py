"""`--dtype auto`: the precision whose best subnet under the budget is best after what rounding costs it."""

from __future__ import annotations

import dataclasses
import json
import math
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from amoeba_export.application.choose import choose
from amoeba_export.application.costs import make_predictor
from amoeba_export.application.session import Session
from amoeba_export.backends.targets import graph_options
from amoeba_export.cache.kinds import ROUNDING
from amoeba_export.errors import NumbersDiffer, TargetError, UsageError
from amoeba_export.formats import FORMATS
from amoeba_export.formats.write import write_formats
from amoeba_export.ir import Budget, DenseArchitecture
from amoeba_export.ir.dtype import AUTO
from amoeba_export.materialize import materialize_subnet
from amoeba_export.search import Predictor, SearchResult, quality_surface, search_precision
from amoeba_export.verify import verify_artifact

FIGURES_NAME = "figures.json"

TRIED = ("fp16", "int8", "int4")
"""Precisions that are tried besides the target's own."""


def with_dtype(session: Session) -> Session:
    """`session` with a precision: the one asked for, or the best of those that the target's first format can hold.

    Every precision that is tried has a cost table of its own, and what it costs in quality is measured once, on the
    full model: the mean KL divergence of its logits stands for the rise of the loss. A precision that the target
    cannot run, or that breaks the limits of `amoeba verify`, is left out. A budget that is a share of the full model
    means the full model in the target's own precision.

    Raises:
        UsageError: The strategy's quality is neither a loss nor a perplexity.
        NothingFits: No precision has a subnet that fits.
        TargetError: The target can run none of them.
    """
    settings, progress = session.settings, session.progress
    if settings.dtype != AUTO:
        return session
    surface = quality_surface(session.strategy)
    if surface.metric not in ("loss", "perplexity"):
        raise UsageError(
            f"--dtype auto weighs what rounding costs in loss, and this strategy's quality is '{surface.metric}'.",
            next_step="Name a --dtype, or calibrate with the quality metric 'loss'.",
        )
    predictors: dict[str, Predictor] = {}
    worse_by: dict[str, float] = {}
    failure: TargetError | None = None
    for dtype in dict.fromkeys((session.target.dtype, *TRIED)):
        if dtype not in FORMATS[settings.formats[0]].dtypes:
            continue
        try:
            tried = _in(session, dtype)
            divergence = _divergence(tried)
            predictors[dtype] = make_predictor(tried)
        except NumbersDiffer as error:
            progress.note(f"{dtype} is left out. {error.what}")
            continue
        except TargetError as error:
            progress.note(f"{dtype} is left out. {error.what}")
            failure = error
            continue
        full = surface.at(session.architecture.num_layers, 1.0)
        worse_by[dtype] = math.expm1(divergence) * full.value if surface.metric == "perplexity" and full else divergence
    if not predictors:
        raise failure or UsageError(
            f"--dtype auto found no precision for '{settings.formats[0]}'.", next_step="Name a --dtype."
        )

    budgets = tuple(_absolute(budget, predictors, session.full) for budget in settings.budgets)

    def search(dtype: str) -> SearchResult:
        result = choose(_in(session, dtype, budgets=budgets), predictors[dtype])
        progress.note(
            f"{dtype}: {result.best.shape} at {result.best.predicted_ms:.4g} ms, "
            f"{surface.metric} {result.best.quality.value:.4g} + {worse_by[dtype]:.2g} by rounding."
        )
        return result

    chosen, _ = search_precision(list(predictors), search, worse_by=worse_by)
    progress.note(f"Precision: {chosen}.")
    return _in(session, chosen, budgets=budgets)


def _in(session: Session, dtype: str, **settings: Any) -> Session:
    return session.with_settings(dataclasses.replace(session.settings, dtype=dtype, **settings))


def _absolute(budget: Budget, predictors: Mapping[str, Predictor], uncut: DenseArchitecture) -> Budget:
    """A share of the full model as milliseconds: of the full model in the first, the target's own, precision.

    A coarser model is not to be held to a share of its own, smaller time.
    """
    if budget.fraction is None:
        return budget
    predictor = next(iter(predictors.values()))
    full_ms, _ = predictor.predict(uncut, budget.metric, budget.percentile)
    return dataclasses.replace(budget, fraction=None, limit_ms=budget.resolve(full_ms))


def _divergence(session: Session) -> float:
    """Mean KL divergence in nats of the full model written in the session's dtype, from the cache or measured now.

    Raises `NumbersDiffer` where it is beyond what is accepted of an artifact.
    """
    supernet, dtype, progress = session.supernet, session.dtype, session.progress
    container = session.settings.formats[0]
    options = {"onnx": graph_options(session.target, dtype)} if container == "onnx" else {}
    facts = {
        "model": supernet.identity,
        "adapters": [item.sha256 for item in supernet.inputs if item.role == "adapter"],
        "format": container,
        "dtype": dtype,
        "options": options,
    }
    found = session.cache.get(ROUNDING, facts, progress=progress)
    if found is None:
        plan = supernet.full_plan()
        with tempfile.TemporaryDirectory(prefix="amoeba-") as scratch:
            folder = Path(scratch)
            write_formats(
                materialize_subnet(supernet, plan), folder, {container: dtype}, options=options, progress=progress
            )
            figures = verify_artifact(folder, supernet, plan, progress=progress).to_json()[container]

        def write(place: Path) -> None:
            (place / FIGURES_NAME).write_text(json.dumps(figures), encoding="utf-8")

        found = session.cache.put(ROUNDING, facts, write)
    return float(json.loads((found / FIGURES_NAME).read_text())["mean_kl"])
