"""Ask the search for a session's subnet, with what was measured so far."""

from __future__ import annotations

import dataclasses
from contextlib import suppress

from amoeba_export.application.costs import is_measured
from amoeba_export.application.session import Session
from amoeba_export.errors import NothingFits
from amoeba_export.formats.sizes import weight_bytes
from amoeba_export.profile import predict_memory_mb
from amoeba_export.search import Predictor, Problem, SearchResult, Seen, search_plan

MARGIN = 0.02
"""The share of a budget that predictions leave free; on a noisy machine, as much as cannot be told apart. Where nothing
is that far below the budget, less."""


def problem_of(session: Session) -> Problem:
    """What `session` wants a search to choose."""
    settings, dtype = session.settings, session.dtype
    return Problem(
        strategy=session.strategy,
        architecture=session.architecture,
        budgets=settings.budgets,
        policy=settings.policy,
        align=settings.align,
        gate_widths=session.supernet.gate_widths,
        memory_mb=lambda dense: predict_memory_mb(
            dense,
            weight_bytes=weight_bytes(dense, settings.formats, dtype).total,
            dtype=dtype,
            workload=settings.workload,
        ),
        memory_limit_mb=settings.memory_limit_mb,
    )


def choose(session: Session, predictor: Predictor, seen: Seen | None = None) -> SearchResult:
    """Search once.

    Where the target will be asked about the choice, predictions stay the margin of `seen` away from the limits, or
    else `MARGIN`, or else what they can.

    Raises:
        NothingFits: Not even without a margin.
    """
    problem, seen = problem_of(session), seen or Seen(margin=MARGIN)
    margins = sorted({seen.margin, MARGIN}, reverse=True) if is_measured(session.target) else []
    for margin in margins:
        with suppress(NothingFits):
            return search_plan(problem, predictor, dataclasses.replace(seen, margin=margin))
    return search_plan(problem, predictor, dataclasses.replace(seen, margin=0.0))
