"""The uncut model in each precision: how fast, and how good. What a subnet has to beat, and what budgets refer to."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from amoeba_export.application.costs import device_facts
from amoeba_export.application.rounding import Rounding, measure_rounding
from amoeba_export.application.session import Session
from amoeba_export.backends import Subject, measure_latency
from amoeba_export.cache.kinds import FULL_MODELS
from amoeba_export.errors import NotRepresentable, NumbersDiffer, TargetError, UsageError
from amoeba_export.ir import Latency
from amoeba_export.ir.dtype import AUTO
from amoeba_export.reading.decode import decode

FIGURES_NAME = "latencies.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Whole:
    """The uncut model in one precision.

    Attributes:
        rounding: None where only one precision is known: there is nothing to weigh.
    """

    dtype: str
    latency: Latency
    rounding: Rounding | None

    @property
    def rise(self) -> float:
        """Of the loss by rounding, in nats per token."""
        return self.rounding.rise if self.rounding else 0.0


def measure_wholes(session: Session, *, with_data: bool = True) -> tuple[Whole, ...]:
    """The uncut model in every precision that may be chosen, and then in those of the target, for comparison.

    The first one is what a share of the full model refers to. A precision that the target cannot run, or that breaks
    the limits of `amoeba verify`, is left out, as one that cannot be written here.

    Args:
        session: With a target.
        with_data: Choose integers with data where an export would. Without, `chosen_with_data` does it later.

    Raises:
        TargetError: The target can run none that may be chosen.
        UsageError: Its first format can hold none.
    """
    allowed = session.settings.dtypes
    if not allowed:
        raise UsageError(
            f"None of the target's precisions can be written as '{session.settings.formats[0]}'.",
            next_step="Name a --dtype, or another --format.",
        )
    auto = session.with_settings(dataclasses.replace(session.settings, dtype=AUTO))
    dtypes = tuple(dict.fromkeys((*allowed, *auto.settings.dtypes)))

    def rounding_of(dtype: str) -> Rounding | None:
        return measure_rounding(session.in_dtype(dtype), with_data=with_data) if len(dtypes) > 1 else None

    return _each(session, _latencies(session, dtypes), rounding_of)


def chosen_with_data(session: Session, wholes: Sequence[Whole]) -> tuple[Whole, ...]:
    """`wholes` with integers chosen with data in the precisions that may be chosen; the others are for comparison.

    Raises as `measure_wholes`.
    """
    roundings = {one.dtype: one.rounding for one in wholes}

    def rounding_of(dtype: str) -> Rounding | None:
        known = roundings[dtype]
        if known is None or known.how != "nearest" or dtype not in session.settings.dtypes:
            return known
        return measure_rounding(session.in_dtype(dtype))

    return _each(session, {one.dtype: one.latency for one in wholes}, rounding_of)


def _each(
    session: Session,
    latencies: Mapping[str, Latency | TargetError],
    rounding_of: Callable[[str], Rounding | None],
) -> tuple[Whole, ...]:
    allowed = session.settings.dtypes
    found: list[Whole] = []
    failure: NumbersDiffer | NotRepresentable | TargetError | None = None
    for dtype, latency in latencies.items():
        try:
            if isinstance(latency, TargetError):
                raise latency
            rounding = rounding_of(dtype)
        except (NumbersDiffer, NotRepresentable, TargetError) as error:
            if failure is None and dtype in allowed:
                failure = error
            session.progress.note(f"{dtype} is left out. {error.what}")
            continue
        found.append(Whole(dtype=dtype, latency=latency, rounding=rounding))
    if not any(whole.dtype in allowed for whole in found):
        assert failure is not None
        raise failure
    return tuple(found)


def _latencies(session: Session, dtypes: Sequence[str]) -> Mapping[str, Latency | TargetError]:
    """From one run, so that they can be compared; from the cache where it was made before."""
    target, workload = session.target, session.settings.workload
    subjects = [Subject(dense=session.full, dtype=dtype, label=f"the full model in {dtype}") for dtype in dtypes]
    if not session.is_measured:
        estimates = session.backend.measure(subjects, workload, target=target)
        return dict(zip(dtypes, estimates, strict=True))
    facts = {"dtypes": list(dtypes), **device_facts(session.supernet, target, workload)}
    found = session.cache.get_json(FULL_MODELS, facts, FIGURES_NAME, progress=session.progress)
    if found is not None:
        return decode(dict[str, Latency], found)
    results = measure_latency(subjects, workload, target=target, progress=session.progress)
    latencies = dict(zip(dtypes, results, strict=True))
    known = {dtype: one for dtype, one in latencies.items() if isinstance(one, Latency)}
    if len(known) == len(dtypes):  # what failed is asked again
        content = {dtype: dataclasses.asdict(one) for dtype, one in known.items()}
        session.cache.put_json(FULL_MODELS, facts, FIGURES_NAME, content)
    return latencies
