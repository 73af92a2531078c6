"""Every mistake amoeba can name, and the exit code of each kind. Imports nothing of ours.

The direct children of `AmoebaError` are the *kinds*: one exit code each (a test asserts that they differ). A mistake
that deserves its own wording is a subclass of its kind, defined here, whose constructor takes the facts and builds the
sentence, so that a raise site reads as `raise UnknownTarget(name, known)`.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from pathlib import Path


class AmoebaError(Exception):
    """Something amoeba can explain: what happened, where, and what to do next.

    Args:
        what: One sentence: what happened, in terms of what the user gave us.
        where: The file, key or position concerned, if it is not already in `what`.
        next_step: What the user can do about it.

    `str(error)` reads in full, for library users who never see our console.
    """

    exit_code = 1

    def __init__(self, what: str, *, where: str | Path | None = None, next_step: str | None = None) -> None:
        self.what = what
        self.where = str(where) if where is not None else None
        self.next_step = next_step
        super().__init__(what)

    def __str__(self) -> str:
        lines = [self.what]
        if self.where is not None:
            lines.append(f"  where: {self.where}")
        if self.next_step is not None:
            lines.append(f"  next:  {self.next_step}")
        return "\n".join(lines)


class UsageError(AmoebaError):
    """The command line or an API argument makes no sense as given."""

    exit_code = 2


class InputError(AmoebaError):
    """A file that we were given cannot be used: missing, damaged, or of another model."""

    exit_code = 3


class BudgetError(AmoebaError):
    """No shape of this model meets the budget on this target."""

    exit_code = 4


class VerificationError(AmoebaError):
    """What was written does not compute what it should."""

    exit_code = 5


class TargetError(AmoebaError):
    """The target is not reachable, or measuring on it failed."""

    exit_code = 6


class UnsupportedError(AmoebaError):
    """A correct request that this container, family or adapter type cannot represent."""

    exit_code = 7


def nearest(name: str, known: Iterable[str]) -> str:
    """` Did you mean 'x'?` for the known name closest to `name`, or an empty string."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f" Did you mean '{close[0]}'?" if close else ""


# --- usage ------------------------------------------------------------------------------------------------------------


class UnknownName(UsageError):
    """A name that is not in a closed list: a target, a format, a policy, a task."""

    def __init__(self, kind: str, name: str, known: Iterable[str], *, where: str | Path | None = None) -> None:
        choices = sorted(known)
        super().__init__(
            f"There is no {kind} named '{name}'.{nearest(name, choices)}",
            where=where,
            next_step=f"Choose one of: {', '.join(choices)}.",
        )


class BadValue(UsageError):
    """A value that cannot be read as what it should be, such as `--latency banana`."""

    def __init__(self, what: str, value: str, expected: str, *, where: str | Path | None = None) -> None:
        super().__init__(f"{what} cannot be '{value}'.", where=where, next_step=f"Give {expected}.")


class Problems(UsageError):
    """Several bad settings, reported together. Its exit code is that of the first one."""

    def __init__(self, problems: Sequence[AmoebaError]) -> None:
        self.problems = tuple(problems)
        self.exit_code = problems[0].exit_code
        listed = "\n".join(f"  {number}. {problem}" for number, problem in enumerate(problems, 1))
        super().__init__(f"{len(problems)} settings are wrong:\n{listed}")


class OutputExists(UsageError):
    """`--out` names something that is already there."""

    def __init__(self, path: Path) -> None:
        super().__init__(
            f"The output '{path}' already exists.", next_step="Choose another --out, or replace it with --force."
        )


# --- input ------------------------------------------------------------------------------------------------------------


class NotFound(InputError):
    """A path that does not exist."""

    def __init__(self, what: str, path: str | Path, *, next_step: str | None = None) -> None:
        super().__init__(f"{what} was not found: {path}", next_step=next_step)


class DamagedFile(InputError):
    """A file that exists and cannot be read as what it claims to be: truncated, wrong header, not that format."""

    def __init__(self, path: str | Path, reason: str, *, next_step: str = "Get the file again and retry.") -> None:
        super().__init__(f"This file is damaged or not what its name says: {reason}", where=path, next_step=next_step)


class WrongModel(InputError):
    """A strategy, adapter or plan that was made for another model."""

    def __init__(self, what: str, differences: Iterable[str], *, where: str | Path | None = None) -> None:
        super().__init__(
            f"{what} was made for another model: {'; '.join(differences)}.",
            where=where,
            next_step=f"Use {what[0].lower()}{what[1:]} that belongs to this model, or make a new one.",
        )


class WeightsMismatch(InputError):
    """Weights that do not fit their config.json: missing, left over, or of another shape."""

    def __init__(self, problems: Sequence[str], *, where: str | Path, shown: int = 6) -> None:
        self.problems = tuple(problems)
        more = f"; and {len(problems) - shown} more" if len(problems) > shown else ""
        super().__init__(
            f"The weights do not fit the model's config: {'; '.join(problems[:shown])}{more}.",
            where=where,
            next_step="Give config.json and weights that belong together.",
        )


class DiskFull(InputError):
    """The output does not fit on its disk. Found before the work, by reserving the space."""

    def __init__(self, path: Path, needed_bytes: int, free_bytes: int) -> None:
        super().__init__(
            f"The disk is too full: {needed_bytes:,} bytes are needed and {free_bytes:,} are free.",
            where=path,
            next_step="Free some space, or choose an --out on another disk.",
        )


class NonFiniteWeights(InputError):
    """A weight with NaN or infinity in it: everything computed from it would be one too."""

    def __init__(self, name: str, origin: str) -> None:
        super().__init__(
            f"The weight {name} is not finite: {origin}.", next_step="Get the file again, or train it again."
        )


# --- budget ------------------------------------------------------------------------------------------------------------


class NothingFits(BudgetError):
    """Every candidate of a search is over a limit. Names the one that comes closest."""

    def __init__(self, limits: str, closest: str, reached: str, *, next_step: str) -> None:
        super().__init__(
            f"No shape that the strategy knows meets {limits}; the closest, {closest}, reaches {reached}.",
            next_step=next_step,
        )


# --- not representable ------------------------------------------------------------------------------------------------


class NotRepresentable(UnsupportedError):
    """A plan that a container cannot hold. Names the containers that can."""

    def __init__(self, container: str, reason: str, alternatives: Iterable[str]) -> None:
        super().__init__(
            f"{container} cannot hold this plan: {reason}.", next_step=f"Use one of: {', '.join(alternatives)}."
        )
