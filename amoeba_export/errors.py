"""Every mistake amoeba can name, and the exit code of each kind. Imports nothing of ours.

The direct children of `AmoebaError` are the *kinds*: one exit code each (a test asserts that they differ). A mistake
that deserves its own wording is a subclass of its kind, defined here, whose constructor takes the facts and builds the
sentence, so that a raise site reads as `raise UnknownTarget(name, known)`.

Long on purpose: it is one list, read to see what has a name already, and `tests/test_errors.py` and
`docs/errors.md` are held against it. In several files it would need a second list to be found by.
"""

from __future__ import annotations

import difflib
import errno
import math
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from amoeba_export.shown import an


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
        # A name out of a damaged file may hold half characters, which no stream takes.
        return "\n".join(lines).encode("utf-8", "backslashreplace").decode("utf-8")


class UsageError(AmoebaError):
    """The command line or an API argument is wrong."""

    exit_code = 2


class InputError(AmoebaError):
    """A given file cannot be used: it is missing, damaged, or of another model."""

    exit_code = 3


class BudgetError(AmoebaError):
    """No shape of this model meets the budget on this target."""

    exit_code = 4


class VerificationError(AmoebaError):
    """A written file does not compute the same as the cut model."""

    exit_code = 5


class TargetError(AmoebaError):
    """The target is not reachable, or measuring on it failed."""

    exit_code = 6


class UnsupportedError(AmoebaError):
    """The request is correct, but this format, family or adapter type cannot represent it."""

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
    """A value of the wrong form, such as `--latency banana`."""

    def __init__(self, what: str, value: str, expected: str, *, where: str | Path | None = None) -> None:
        super().__init__(f"{what} cannot be '{value}'.", where=where, next_step=f"Give {expected}.")


class NothingToPick(UsageError):
    """`--pick` names a number that the frontier does not have."""

    def __init__(self, number: int, count: int) -> None:
        super().__init__(
            f"The frontier has no number {number}: its choices are 1 to {count}.",
            next_step="'amoeba frontier' with the same settings shows them.",
        )


class Problems(UsageError):
    """Several wrong settings, reported together. The exit code is that of the first one."""

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


class NotReplaceable(UsageError):
    """`--force` for a folder that amoeba did not make. It replaces only artifacts and empty folders."""

    def __init__(self, path: Path) -> None:
        super().__init__(
            f"The output '{path}' is not an artifact, so --force does not replace it.",
            next_step="Choose another --out, or remove it yourself.",
        )


# --- input ------------------------------------------------------------------------------------------------------------


class NotFound(InputError):
    """A path that does not exist."""

    def __init__(self, what: str, path: str | Path, *, next_step: str | None = None) -> None:
        super().__init__(f"{what} was not found: {path}", next_step=next_step)


class DamagedFile(InputError):
    """A file that exists but is damaged: truncated, with a wrong header, or of another format."""

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


class NotAsWritten(InputError):
    """An artifact whose files, manifest, plan and statement contradict each other. Lists every contradiction."""

    def __init__(self, folder: Path, problems: Sequence[str]) -> None:
        self.problems = tuple(problems)
        super().__init__(
            f"The artifact is not as it was written: {'; '.join(problems)}.",
            where=folder,
            next_step="Copy or export it again.",
        )


class OtherInputs(InputError):
    """An artifact that was cut from another model, strategy or adapter than the given one."""

    def __init__(self, folder: Path, differences: Sequence[str]) -> None:
        super().__init__(
            f"The artifact was cut from something else: {'; '.join(differences)}.",
            where=folder,
            next_step="Give its model, strategy and adapters with --model, --strategy and --adapter.",
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


class ReadOnlyOutput(InputError):
    """An output path that cannot be written."""

    def __init__(self, path: Path, reason: str) -> None:
        super().__init__(
            f"The output '{path}' cannot be written: {reason}.",
            next_step="Choose an --out in a folder that you may write to.",
        )


class CacheUnusable(InputError):
    """A cache that cannot be written: its disk is full or read-only, or its path is not a folder."""

    def __init__(self, root: Path, reason: str) -> None:
        super().__init__(
            f"The cache cannot be written: {reason}.",
            where=root,
            next_step="Free space there ('amoeba cache prune'), or set AMOEBA_CACHE to a folder that you may write to.",
        )


class NotUtf8(InputError):
    """A path whose bytes are not UTF-8. The libraries that read weights cannot open it."""

    def __init__(self, path: Path) -> None:
        super().__init__(
            "This path is not UTF-8 text, and the libraries that read and write weights cannot open it.",
            where=path,
            next_step="Rename it, or give another path.",
        )


class UnsafePickle(InputError):
    """A pickle that contains code. The code was not run."""

    def __init__(self, path: str | Path, name: str) -> None:
        super().__init__(
            f"To load this file would run code: it names {name}. Amoeba did not load it.",
            where=path,
            next_step="Do not open it with other tools either; get the file from someone you trust.",
        )


class ForeignCode(InputError):
    """An artifact that contains or names code of others. The code was not run."""

    def __init__(self, path: str | Path, problem: str) -> None:
        super().__init__(
            f"This artifact contains code that is not amoeba's: {problem}. It was not run.",
            where=path,
            next_step="Do not load it with other tools either; get it from its author, or export it again.",
        )


class LinkOutside(InputError):
    """A model or adapter folder with a link to a file outside."""

    def __init__(self, folder: Path, name: Path, target: Path) -> None:
        super().__init__(
            f"This folder has a link to a file outside: {name} is {target}. An export would publish that file.",
            where=folder,
            next_step="If you mean that file, put a copy of it in the folder; else get the folder again.",
        )


class DiskFull(InputError):
    """The disk has too little free space for the output. Amoeba reserves the space before the work."""

    def __init__(self, path: Path, needed_bytes: int, free_bytes: int) -> None:
        super().__init__(
            f"The disk is too full: {needed_bytes:,} bytes are needed and {free_bytes:,} are free.",
            where=path,
            next_step="Free some space, or choose an --out on another disk.",
        )


class NonFiniteWeights(InputError):
    """A weight that contains NaN or infinity."""

    def __init__(self, name: str, origin: str) -> None:
        super().__init__(
            f"The weight {name} is not finite: {origin}.", next_step="Get the file again, or train it again."
        )


class EmptyData(InputError):
    """An empty data file."""

    def __init__(self, path: str | Path, *, what: str = "calibration data") -> None:
        super().__init__(f"The {what} is empty.", where=path, next_step="Give a file with text in it.")


class NotText(InputError):
    """A data file that is not UTF-8 text, such as an archive or a checkpoint."""

    def __init__(
        self,
        path: str | Path,
        offset: int,
        *,
        what: str = "calibration data",
        next_step: str = "Give a text file, a JSONL file, or the id of a data set.",
    ) -> None:
        super().__init__(
            f"The {what} is not UTF-8 text: byte {offset} cannot be read.", where=path, next_step=next_step
        )


class BadRecord(InputError):
    """A line of a JSONL file that is not a valid record."""

    def __init__(
        self,
        path: str | Path,
        line: int,
        problem: str,
        *,
        what: str = "calibration data",
        next_step: str = "Correct the line, or name the right fields in the recipe.",
    ) -> None:
        super().__init__(f"Line {line} of the {what} {problem}.", where=f"{path}:{line}", next_step=next_step)


class BadConfig(InputError):
    """An amoeba.toml with mistakes. Lists all of them: line, what is wrong, what to write instead."""

    def __init__(self, path: Path, problems: Sequence[tuple[int, str, str]]) -> None:
        self.problems = tuple(problems)
        listed = "\n".join(
            f"  line {line}: {what}{'' if what.endswith('?') else '.'} {fix}." for line, what, fix in problems
        )
        count = "a mistake" if len(problems) == 1 else f"{len(problems)} mistakes"
        super().__init__(
            f"{path.name} has {count}:\n{listed}",
            where=path,
            next_step="Correct the file; docs/toml.md lists every key.",
        )


class NotLocked(InputError):
    """`--locked` without a lock, or for an entry that is not in it."""

    def __init__(self, path: Path, entry: str | None = None) -> None:
        what = f"The build '{entry}' is not in the lock." if entry else "There is no lock to build from."
        super().__init__(what, where=path, next_step="Run 'amoeba build' without --locked, and commit the lock.")


class LockedInputChanged(InputError):
    """`--locked` with an input that changed after the lock was written."""

    def __init__(self, path: Path, entry: str, changes: Sequence[str]) -> None:
        super().__init__(
            f"The build '{entry}' is locked and its inputs have changed: {'; '.join(changes)}.",
            where=path,
            next_step="Restore them, or run 'amoeba build' without --locked and commit the new lock.",
        )


class LockedOutputDiffers(InputError):
    """`--locked` gave other bytes than the lock names."""

    def __init__(self, path: Path, entry: str, files: Sequence[str]) -> None:
        super().__init__(
            f"The build '{entry}' has other weights than the lock says: {', '.join(files)}.",
            where=path,
            next_step="Use the versions in the lock (key 'tool'), or build without --locked.",
        )


class TooFewSamples(InputError):
    """A data set with fewer samples than the recipe needs."""

    def __init__(self, where: str | Path, found: str, needed: str) -> None:
        super().__init__(
            f"The calibration data is too small: it has {found}, and the recipe takes {needed}.",
            where=where,
            next_step="Give more data, or a recipe with fewer samples or a shorter window.",
        )


class NotANumber(InputError):
    """A calibration metric that is NaN."""

    def __init__(self, metric: str, removed: Sequence[int]) -> None:
        without = f"without layers {', '.join(map(str, removed))}" if removed else "with all its layers"
        super().__init__(
            f"The {metric} of the model {without} is not a number.",
            next_step="Check the model: run it on a sentence, or get its weights again.",
        )


# --- budget ----------------------------------------------------------------------------------------------------------


class NothingFits(BudgetError):
    """Every candidate of a search is over a limit. Names the one that comes closest."""

    def __init__(self, limits: str, closest: str, reached: str, *, next_step: str, load: float = math.inf) -> None:
        super().__init__(
            f"No shape that the strategy knows meets {limits}; the closest, {closest}, reaches {reached}.",
            next_step=next_step,
        )
        self.load = load  # of the limit that the closest takes most of


class NothingLoads(BudgetError):
    """The target's runtime loads no shape of the strategy, with any budget."""

    def __init__(self, runtime: str, problems: Sequence[str]) -> None:
        super().__init__(
            f"{runtime} loads no shape that the strategy knows: {'; '.join(problems)}.",
            next_step="Choose another flow ('amoeba targets'), another --dtype, or calibrate more widths.",
        )
        self.load = math.inf


class BudgetMissed(BudgetError):
    """A built subnet is over its budget when measured, and there is no smaller one.

    `smaller`: What to do for a smaller one.
    """

    def __init__(
        self, shape: str, metric: str, percentile: int, reached_ms: float, limit_ms: float, *, smaller: str
    ) -> None:
        super().__init__(
            f"The subnet {shape} takes {reached_ms:.4g} ms ({metric} p{percentile}); the budget is {limit_ms:.4g} ms.",
            next_step=f"Allow {reached_ms * 1.03:.3g} ms, or {smaller}.",
        )


class MemoryExceeded(BudgetError):
    """A given shape or plan, or a number of a frontier, is over the memory limit."""

    def __init__(self, shape: str, occupied_mb: float, limit_mb: float, *, smaller: str) -> None:
        super().__init__(
            f"The subnet {shape} occupies {occupied_mb:.4g} MiB; the limit is {limit_mb:.4g} MiB.",
            next_step=f"Allow more memory, or {smaller}.",
        )


class NothingInMemory(BudgetError):
    """Every model of a frontier is over the memory limit."""

    def __init__(self, limit_mb: float, *, smaller: str) -> None:
        super().__init__(
            f"No model on the frontier is within {limit_mb:.4g} MiB of memory.",
            next_step=f"Allow more memory, or {smaller}.",
        )


class SlowerThanBaseline(BudgetError):
    """`amoeba bench --fail-if-slower`: the whole interval of an artifact is over the limit."""

    def __init__(self, slower: Sequence[str], margin: str) -> None:
        super().__init__(
            f"{'; '.join(slower)}. The limit is {margin}.",
            next_step="Compare the two manifests and plans, or allow more with --fail-if-slower.",
        )


class QualityTooLow(BudgetError):
    """The best subnet within the latency budget is worse than `quality_floor` or `--quality`."""

    def __init__(self, shape: str, metric: str, value: float, floor: float) -> None:
        super().__init__(
            f"The subnet {shape} has a {metric} of {value:.4g}; the quality floor is {floor:.4g}.",
            next_step="Allow more latency, or accept a worse quality.",
        )


class NothingGoodEnough(BudgetError):
    """No model on the target reaches `--quality` or `--quality-loss`."""

    def __init__(self, metric: str, wanted: float, best: str, reached: float) -> None:
        super().__init__(
            f"No model reaches {metric} {wanted:.4g}; the best, {best}, has {reached:.4g}.",
            next_step="Accept a worse quality, or fine-tune the model first.",
        )


# --- target -----------------------------------------------------------------------------------------------------------


class EstimateRefused(TargetError):
    """`--require-measured` on a target whose latency is only estimated."""

    def __init__(self, target: str, source: str) -> None:
        super().__init__(
            f"The latency of target '{target}' is an estimate ({source}), and --require-measured refuses estimates.",
            next_step="Choose a target that is measured here, or leave --require-measured out.",
        )


class NothingIsCut(UsageError):
    """A refit of a plan that keeps everything."""

    def __init__(self, plan: str) -> None:
        super().__init__(
            f"The plan '{plan}' keeps everything, so there is nothing to fit.",
            next_step="Give a plan that cuts something, such as the plan.json of an artifact.",
        )


class RefitDiffers(InputError):
    """The refit has another digest than the refit that the plan names."""

    def __init__(self, named: str, found: str, *, was_given: bool) -> None:
        how = "the given one is" if was_given else "another fit on this machine gave"
        super().__init__(
            f"The plan names the refit {named[:12]}, but {how} {found[:12]}.",
            next_step="Give the file with --refit FILE: the last bits of a fit differ between processors.",
        )


class TargetUnavailable(TargetError):
    """A target that cannot be used now: a runtime, a device, a host or a table is missing."""

    def __init__(self, what: str, next_step: str) -> None:
        is_word = what.split(" ", 1)[0].isalpha()  # else a host or a program, which is called as it is called
        super().__init__(f"{what[0].upper() if is_word else what[0]}{what[1:]}.", next_step=next_step)


class CommandFailed(TargetError):
    """A command of a target that gave no figures: it hung, failed, or printed something else."""

    def __init__(self, label: str, target: str, reason: str, *, command: str, printed: str, next_step: str) -> None:
        said = f" It printed last:\n{printed}" if printed else ""
        super().__init__(
            f"Measuring {label} on '{target}' failed: {reason}.{said}",
            where=f"the command {command}",
            next_step=next_step,
        )


class MeasurementFailed(TargetError):
    """A model that could not be measured: it hung, crashed, ran out of memory, or its times are impossible."""

    def __init__(self, label: str, target: str, reason: str, next_step: str) -> None:
        super().__init__(f"Measuring {label} on '{target}' failed: {reason}.", next_step=next_step)


# --- verification ----------------------------------------------------------------------------------------------------


class NumbersDiffer(VerificationError):
    """A written format does not compute the same as the masked supernet."""

    def __init__(self, folder: Path, findings: Sequence[str]) -> None:
        super().__init__(
            f"The written files do not compute the same as the cut model: {'; '.join(findings)}.",
            where=folder,
            next_step="Try another --dtype or --format; with fp32 this is a bug in amoeba, please report it.",
        )


class SourceDisagrees(VerificationError):
    """Amoeba and llama.cpp read a GGUF source differently."""

    def __init__(self, path: Path, findings: Sequence[str], *, shown: int = 3) -> None:
        more = f"; and {len(findings) - shown} more" if len(findings) > shown else ""
        super().__init__(
            f"Amoeba and llama.cpp read this GGUF file differently: {'; '.join(findings[:shown])}{more}.",
            where=path,
            next_step="Give the model as a Hugging Face folder; and please report it, with the file's metadata.",
        )


class TokensDiffer(VerificationError):
    """llama.cpp gives other tokens for a text than the model's tokenizer."""

    def __init__(self, path: Path, findings: Sequence[str], *, shown: int = 3) -> None:
        more = f"; and {len(findings) - shown} more" if len(findings) > shown else ""
        super().__init__(
            f"llama.cpp splits text differently from the model's tokenizer: {'; '.join(findings[:shown])}{more}.",
            where=path,
            next_step="Use --format safetensors or --format onnx, which contain the tokenizer unchanged.",
        )


class NotRunnable(VerificationError):
    """The runtime of a written format does not open it, or fails to run it."""

    def __init__(self, folder: Path, reason: str) -> None:
        super().__init__(
            f"The written model does not run: {reason}.",
            where=folder,
            next_step="Copy or export it again; if it was just written, this is a bug in amoeba, please report it.",
        )


# --- not representable ------------------------------------------------------------------------------------------------


class UnsupportedModel(UnsupportedError):
    """A model of a family that amoeba does not support."""

    def __init__(self, model_type: object, supported: Iterable[str], *, where: str | Path | None = None) -> None:
        names = sorted(supported)
        super().__init__(
            f"Models of type '{model_type}' are not supported.{nearest(str(model_type), names)}",
            where=where,
            next_step=f"Use a model of one of these types: {', '.join(names)}.",
        )


class MixtureOfExperts(UnsupportedError):
    """A mixture of experts of a kind that amoeba does not support."""

    def __init__(
        self, model_type: object, num_experts: object, known: Iterable[str], *, where: str | Path | None = None
    ) -> None:
        super().__init__(
            f"{an(model_type, begins=True)} is a mixture of {num_experts} experts of a kind that is not supported.",
            where=where,
            next_step=f"Use a model of one of these types: {', '.join(sorted(known))}.",
        )


class UnsupportedAdapter(UnsupportedError):
    """An adapter with an option that cannot be merged into the weights of a cut model."""

    def __init__(self, option: str, *, where: str | Path) -> None:
        super().__init__(
            f"The adapter uses {option}, which is not supported.",
            where=where,
            next_step="Merge it with peft (merge_and_unload, save_pretrained) and give the merged model, or train a "
            "LoRA without it.",
        )


class NotForExperts(UnsupportedError):
    """An operation that amoeba does not support for a mixture of experts."""

    def __init__(self, done: str, instead: str) -> None:
        super().__init__(f"The experts of a model cannot be {done}.", next_step=f"Use {instead}.")


class NotRepresentable(UnsupportedError):
    """A plan that a format cannot hold. Names the formats that can."""

    def __init__(self, container: str, reason: str, alternatives: Iterable[str]) -> None:
        self.container, self.reason, self.alternatives = container, reason, tuple(alternatives)
        next_step = f"Use one of: {', '.join(self.alternatives)}." if self.alternatives else "Use another model."
        super().__init__(f"{container} cannot hold this plan: {reason}.", next_step=next_step)

    @classmethod
    def in_fp16(cls, name: str) -> NotRepresentable:
        """Values of the weight `name` are too large."""
        return cls("fp16", f"values of {name} exceed its range", ("--dtype bf16", "--dtype fp32"))

    def without(self, format_name: str) -> NotRepresentable:
        """The same without the advice to use a format that cannot hold it either."""
        advice = f"--format {format_name}"
        kept = [known for known in self.alternatives if known != advice and not known.startswith(f"{advice} ")]
        return NotRepresentable(self.container, self.reason, kept)


class OutsideLimits(UnsupportedError):
    """A given plan or shape that the target's runtime does not load."""

    def __init__(self, target: str, runtime: str, problems: Sequence[str]) -> None:
        super().__init__(
            f"{runtime} of target '{target}' does not load this plan: {'; '.join(problems)}.",
            next_step=f"'amoeba targets show {target}' lists its limits. Let --latency choose a shape within them, or "
            "choose another flow of the device.",
        )


_ADVICE = {
    (errno.EACCES, errno.EPERM, errno.EROFS): "Check the permissions, and run it again.",
    (errno.ENAMETOOLONG, errno.ELOOP, errno.ENOTDIR): "Give another path.",
    (errno.EFBIG, errno.EMFILE, errno.ENFILE, errno.EIO, errno.ESTALE): (
        "Check the limits ('ulimit -a') and the disk, and run it again."
    ),
}


def refused_with(error: BaseException) -> int | None:
    """The system's error number in an error: an `OSError`, or what libraries written in Rust make of one."""
    if isinstance(error, OSError):
        return error.errno
    found = re.search(r"\(os error (\d+)\)", str(error))
    return int(found.group(1)) if found else None


def explain(error: Exception) -> InputError | None:
    """What the machine refused, in words; None for what only a bug of ours can cause."""
    number = refused_with(error)
    filename = getattr(error, "filename", None)
    where = filename if isinstance(filename, str) else None
    if number in (errno.ENOSPC, errno.EDQUOT):
        return InputError("The disk is full.", where=where, next_step="Free some space and run it again.")
    for numbers, next_step in _ADVICE.items():
        if number in numbers:
            return InputError(f"The system refused: {os.strerror(number)}.", where=where, next_step=next_step)
    return None
