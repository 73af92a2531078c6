"""Every stored weight against what it must be, row by row: also those that no prompt touches.

Two questions are asked of a file. Here: is each weight the expected one, rounded no more than its own storage rounds?
And then, in `artifact.py`: does the graph compute with these very weights what the family computes? The limits of both
do not depend on how coarse the file is.

Integers may have been made from channels that were scaled to look alike: `channels.py` reads the factors from the file.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import torch

from amoeba_export.errors import NumbersDiffer, WeightsMismatch
from amoeba_export.ir import Family
from amoeba_export.verify.channels import Channels, offset_slack
from amoeba_export.verify.expected import Expected, ExpectedWeights
from amoeba_export.verify.numerics import HALF_ULP
from amoeba_export.verify.opened import Opened
from amoeba_export.verify.searched import limits
from amoeba_export.verify.stored import StoredWeights
from amoeba_export.verify.stored.tensor import BITS, Stored

SMALLEST = {"fp32": 2.0**-149, "fp16": 2.0**-25, "bf16": 2.0**-133}
"""Half the distance of the smallest numbers, or more."""

PRECISION = ("w4a16", "w4a16-asym", "int4", "q4_k_m", "q5_k_m", "q6_k", "int8", "bf16", "fp16", "fp32")
"""From coarse to fine."""

COARSEST = {"int4-mixed": "int4"}
"""What the coarsest weights are stored in, of a dtype that is not named after it."""

_STEP_SLACK = 1e-3
"""Of a step: what computing the scale in another order does to values half-way between two integers."""

_WIDEST_STEP = 1.02
"""The widest step that is believed is the largest value of a block over the largest integer, by so much: a file may not
choose a step that hides what it rounds away."""

_CHOSEN = 0.9
"""Integers that were chosen with data (a later column makes up for an earlier one) move a matrix by less than this
share of its size: one of SmolLM2-135M by 0.40 at most, in directions that its inputs hardly have. A single row may move
by twice its size. A matrix that is missing moves by 1, another one by 1.4, the negative by 2."""

_PIECE_VALUES = 1 << 17
"""Values that are compared at once: every step then writes to memory that a processor's cache has."""

_SHOWN = 4


def check_weights(folder: Path, stored: StoredWeights, expected: ExpectedWeights) -> dict[str, str]:
    """Compare all weights of a format with what they must be. Returns the dtype that each is stored in.

    Those whose integers were chosen with data must be these very ones, and near what the model has.

    Args:
        folder: The format's.
        stored: Its weights.
        expected: What they must be.

    Raises:
        WeightsMismatch: A weight is missing, or there is one that the plan does not have.
        NumbersDiffer: A weight is not what it must be.
    """
    names = set(stored.names())
    folded = {name for parts in stored.sums.values() for name in parts}
    missing = [name for name in expected.shapes if name not in names and name not in folded]
    problems = [f"{name} is missing" for name in missing]
    for name in sorted(names - set(expected.shapes) - set(stored.sums)):
        # Zeros that a stock type or a runtime wants change nothing; anything else does.
        if bool(stored.read(name).values.any()):
            problems.append(f"{name} is not part of this plan")
    if problems:
        raise WeightsMismatch(problems, where=folder)
    findings: list[str] = []
    dtypes: dict[str, str] = {}
    channels, unrounded = Channels(stored, expected), expected.unrounded()
    own_channels = channels if unrounded is None else Channels(stored, unrounded)
    family = expected.wanted.family
    for name in _norms_first(names & (set(expected.shapes) | set(stored.sums)), family):
        found = stored.read(name)
        dtypes[name] = found.dtype
        wanted = _sum(stored.sums.get(name, (name,)), expected)
        wanted = Expected(found.as_stored(wanted.values), wanted.slack + offset_slack(found))
        wanted = channels.scaled(name, wanted, found)
        problem = deviation(found, wanted)
        if problem is None and unrounded is not None and expected.is_chosen(name) and found.values.dim() == 2:
            own = unrounded.read(name)
            own = own_channels.scaled(name, Expected(found.as_stored(own.values), own.slack), found)
            problem = displacement(found.values, own.values)
        if problem:
            findings.append(f"{name} {problem}")
    if findings:
        more = f"; and {len(findings) - _SHOWN} more weights" if len(findings) > _SHOWN else ""
        raise NumbersDiffer(folder, ["; ".join(findings[:_SHOWN]) + more])
    return dtypes


def check_storage(folder: Path, dtypes: Mapping[str, str], opened: Opened, expected: ExpectedWeights) -> None:
    """Compare what weights are stored in with what the file says of itself: it may not choose its own tolerance.

    Args:
        folder: The format's.
        dtypes: Of each stored weight.
        opened: The format: it says what it is in, and what readers turn its weights into.
        expected: Knows what the source stores a weight in, which is never too coarse.

    Raises:
        NumbersDiffer: A weight is coarser than the file says, or will be made so.
    """
    loaded = getattr(opened, "loaded_dtype", None)
    for name, stored in dtypes.items():
        rank = PRECISION.index(stored)
        if rank < PRECISION.index(COARSEST.get(opened.dtype, opened.dtype)) and stored != expected.source_dtype(name):
            raise NumbersDiffer(folder, [f"{name} is stored in {stored}, and the file says {opened.dtype}"])
        if stored in HALF_ULP and loaded not in (None, "fp32", stored):
            raise NumbersDiffer(folder, [f"{name} is stored in {stored}, and config.json says to load it as {loaded}"])


def displacement(values: torch.Tensor, wanted: torch.Tensor) -> str | None:
    """What is wrong with a matrix whose integers were chosen with data, beside that of the model, or None."""
    share = float((values - wanted).norm() / wanted.norm().clamp_min(SMALLEST["fp16"]))
    if share <= _CHOSEN:  # a NaN is not
        return None
    return f"has integers that do not stand for the model's: it is off by {share:.2g} of its size"


def deviation(found: Stored, expected: Expected) -> str | None:
    """What is wrong with a stored weight, in words, or None.

    Args:
        found: As stored.
        expected: As it would be unrounded, in the file's scale.
    """
    values, wanted = found.values, expected.values
    if values.shape != wanted.shape:
        return f"is {list(values.shape)}, not {list(wanted.shape)}"
    if found.steps is None and found.searched is None and _is_equal(values, wanted):
        return None
    if all(_deviation(*piece) is None for piece in _pieces(found, expected)):
        return None
    return _deviation(found, expected)


def _is_equal(values: torch.Tensor, wanted: torch.Tensor) -> bool:
    """Whether all are the same numbers: one pass, where the limits of each take many."""
    return torch.equal(values, wanted) and all(bool(torch.isfinite(end)) for end in torch.aminmax(values))


def _pieces(found: Stored, expected: Expected) -> Iterator[tuple[Stored, Expected]]:
    """Rows at a time. Scales that were searched are looked at together."""
    values, slack = found.values, expected.slack
    num_rows = max(1, _PIECE_VALUES // max(1, values[:1].numel()))
    if found.searched is not None or num_rows >= len(values):
        yield found, expected
        return
    for start in range(0, len(values), num_rows):
        rows = slice(start, start + num_rows)
        steps = None if found.steps is None else found.steps[rows]
        own_slack = slack[rows] if isinstance(slack, torch.Tensor) and slack.shape == values.shape else slack
        yield replace(found, values=values[rows], steps=steps), Expected(expected.values[rows], own_slack)


def _deviation(found: Stored, expected: Expected) -> str | None:
    values, wanted = found.values, expected.values
    too_wide: torch.Tensor | None = None
    if found.searched is not None:
        allowed, problem = limits(found, wanted)
        if problem is not None:
            return problem
        limit = allowed + expected.slack
    elif found.steps is None:
        limit = wanted.abs() * HALF_ULP[found.dtype] + SMALLEST[found.dtype] + expected.slack
    else:
        largest = 2 ** (BITS[found.dtype] - 1)
        steps = found.steps.abs().repeat_interleave(found.block, dim=1)[:, : values.shape[1]]
        tiny = largest * SMALLEST["fp16"] * 2 if found.half_steps else 1e-37
        widest = _block_maximum(wanted, found.block) * (_WIDEST_STEP / (largest - 1)) + tiny
        too_wide = (found.steps.abs() > widest) & (widest > tiny)
        integers = (values / steps.where(steps > 0, 1.0)).abs()
        inexact = HALF_ULP["fp16"] if found.half_steps else 0.0
        # The integers are -8 to 7 and the like: the largest positive value may lack a whole step.
        beyond = (integers > largest - 1.5) & (wanted.abs() > values.abs()) & (wanted.sign() == values.sign())
        share = beyond * 0.5 + (0.5 + _STEP_SLACK)
        # Values that lie on a grid of few levels have wide steps, and are then as near as on steps that they need.
        needed = torch.minimum(steps, widest.repeat_interleave(found.block, 1)[:, : steps.shape[1]])
        limit = share * needed + integers * inexact * steps + tiny + expected.slack
    off = (values - wanted).abs()
    wrong = ~(off <= limit)  # a NaN is
    if not bool(wrong.any()):
        return None
    if too_wide is not None and bool((too_wide & _any_of_block(wrong, found.block)).any()):
        assert found.steps is not None
        return (
            f"has steps of up to {float((found.steps.abs() / widest)[too_wide].max()):.3g} times what its values need"
        )
    rows = int(wrong.flatten(1).any(1).sum()) if wrong.dim() > 1 else int(wrong.sum())
    what = "rows" if wrong.dim() > 1 else "values"
    return f"differs in {rows} of {len(wrong)} {what}, by up to {float(off[wrong].max()):.3g}"


def _block_maximum(values: torch.Tensor, block: int) -> torch.Tensor:
    padded = torch.nn.functional.pad(values.abs(), (0, -values.shape[1] % block))
    return padded.reshape(len(values), -1, block).amax(-1)


def _any_of_block(flags: torch.Tensor, block: int) -> torch.Tensor:
    padded = torch.nn.functional.pad(flags, (0, -flags.shape[1] % block))
    return padded.reshape(len(flags), -1, block).any(-1)


def _norms_first(names: set[str], family: Family) -> Iterator[str]:
    """Norms before what reads them, and `up` before `down` and its own bias."""

    def rank(name: str) -> tuple[int, str]:
        place = family.find(name)
        is_weight = place is not None and place.part == "weight"
        if place is not None and place.role.endswith("_norm"):
            return 0, name
        return (1 if is_weight and place is not None and place.role == "up" else 2), name

    yield from sorted(names, key=rank)


def _sum(names: tuple[str, ...], expected: ExpectedWeights) -> Expected:
    parts = [expected.read(name) for name in names]
    if len(parts) == 1:
        return parts[0]
    total = torch.stack([part.values for part in parts]).sum(0)
    return Expected(total, sum((part.slack for part in parts), 0.0) + total.abs() * HALF_ULP["fp32"])
