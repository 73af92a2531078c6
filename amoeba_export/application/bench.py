"""A comparison as one call: artifacts side by side, measured in turns in one run."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast, get_args

from amoeba_export.application.resolve import read_plan
from amoeba_export.artifact import Manifest, read_manifest
from amoeba_export.backends import Subject, measure_latency
from amoeba_export.backends.targets import read_target
from amoeba_export.errors import BadValue, SlowerThanBaseline, TargetError
from amoeba_export.ir import SILENT, Latency, Metric, Progress, Workload
from amoeba_export.profile import Comparison, compare_rounds


@dataclass(frozen=True, kw_only=True)
class Benched:
    """One artifact of a run.

    Attributes:
        artifact: Its folder.
        manifest: What it is.
        metric: What was compared.
        result: Its latency, or why it has none.
        comparison: With the first artifact of the run; None where one of the two has no latency.
    """

    artifact: Path
    manifest: Manifest
    metric: Metric
    result: Latency | TargetError
    comparison: Comparison | None

    @property
    def size_bytes(self) -> int:
        """Of all its files."""
        return sum(file.size_bytes for file in self.manifest.files)


def bench(
    artifacts: Sequence[Path],
    *,
    target: str | None = None,
    prompt_tokens: int | None = None,
    generate_tokens: int | None = None,
    batch: int | None = None,
    rounds: int = 5,
    metric: str = "decode",
    progress: Progress = SILENT,
) -> list[Benched]:
    """Measure artifacts side by side, in turns: one at a time, so that a drifting machine favours none.

    Target and workload, where None, are those of the first artifact.

    Args:
        artifacts: Folders that export wrote. The others are compared with the first; doubles are left out.
        target: The name of one, or its TOML file.
        prompt_tokens: Tokens of the prompt.
        generate_tokens: Tokens to generate.
        batch: Sequences at once.
        rounds: How often each has its turn. Five are the fewest that give a ratio an interval.
        metric: `decode`, `prefill` or `e2e`: what is compared.
        progress: Told what is being measured.

    Returns:
        One entry per artifact, in their order. An artifact that cannot be measured has its error as `result`, and
        stops no other.

    Raises:
        UsageError: No such metric.
        InputError: An artifact or the target's file cannot be read.
        TargetError: The target cannot be used.
    """
    if metric not in get_args(Metric):
        raise BadValue("--metric", metric, f"one of: {', '.join(get_args(Metric))}")
    compared = cast(Metric, metric)
    folders = list(dict.fromkeys(artifacts))
    manifests = [read_manifest(artifact) for artifact in folders]
    first = manifests[0].latency
    given = {"prompt_tokens": prompt_tokens, "generate_tokens": generate_tokens, "batch": batch}
    usual = first.workload if first else Workload()
    workload = dataclasses.replace(usual, **{name: number for name, number in given.items() if number})
    found = read_target(target or (first.target if first else "cpu"))
    subjects = [_subject(artifact, manifest) for artifact, manifest in zip(folders, manifests, strict=True)]
    progress.note(
        f"{len(subjects)} artifact{'s' * (len(subjects) > 1)} on {found.name}, {rounds} rounds, prompt "
        f"{workload.prompt_tokens}, generate {workload.generate_tokens}, batch {workload.batch}"
    )
    results = measure_latency(subjects, workload, target=found, progress=progress, rounds=rounds)
    return [
        Benched(
            artifact=artifact,
            manifest=manifest,
            metric=compared,
            result=result,
            comparison=_compared(result, results[0], compared),
        )
        for artifact, manifest, result in zip(folders, manifests, results, strict=True)
    ]


def refuse_slower(benched: Sequence[Benched], margin: float, *, progress: Progress = SILENT) -> None:
    """Refuse what is slower than the first by more than `margin` (0.03 is 3 %), for sure; warn of what is undecided.

    Raises:
        TargetError: One could not be measured.
        SlowerThanBaseline: One is slower: the whole interval of its ratio is above 1 + `margin`.
    """
    allowed = f"{100 * margin:g} % more"
    slower = []
    for one in benched:
        if isinstance(one.result, TargetError):
            raise one.result
    for one in benched[1:]:
        assert one.comparison is not None, "a failed measurement was raised before"
        verdict = one.comparison.verdict(margin)
        what = f"{one.metric} of '{one.artifact}' takes {one.comparison} times as long as of '{benched[0].artifact}'"
        if verdict == "slower":
            slower.append(what[0].upper() + what[1:])
        elif verdict == "undecided":
            needed = one.comparison.rounds_to_decide(margin)
            more = f" About {needed} rounds would tell (--rounds)." if needed else " More rounds would tell (--rounds)."
            progress.warn(f"Undecided: {what}, and {allowed} is allowed.{more}")
    if slower:
        raise SlowerThanBaseline(slower, allowed)


def _subject(artifact: Path, manifest: Manifest) -> Subject:
    dense = read_plan(artifact).dense(manifest.architecture())
    return Subject(dense=dense, artifact=artifact, dtype=manifest.dtype, label=f"'{artifact}'")


def _compared(result: Latency | TargetError, first: Latency | TargetError, metric: Metric) -> Comparison | None:
    """How the first compares with itself is not worth an interval, nor is an estimate: its ratio is exact."""
    if isinstance(result, TargetError) or isinstance(first, TargetError):
        return None
    ours, theirs = result.rounds_of(metric), first.rounds_of(metric)
    if result is first or not ours or not theirs:
        ratio = result.of(metric) / first.of(metric)
        return Comparison(ratio=ratio, low=ratio, high=ratio, rounds=len(ours))
    return compare_rounds(ours, theirs)
