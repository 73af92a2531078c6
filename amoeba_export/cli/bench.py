"""`amoeba bench`: artifacts side by side, measured in turns in one run."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_args

import typer

from amoeba_export.artifact import Manifest, read_manifest
from amoeba_export.cli.completion import complete_from
from amoeba_export.cli.console import Talk, answer, milliseconds, percent, print_json, size, table
from amoeba_export.cli.options import AsJson, OptionalTarget
from amoeba_export.errors import BadValue, InputError, SlowerThanBaseline, TargetError
from amoeba_export.ir import Latency, Metric, Workload

if TYPE_CHECKING:
    from amoeba_export.backends import Subject
    from amoeba_export.profile import Comparison

_COMPARING = "Comparing"


def bench(
    artifacts: Annotated[list[Path], typer.Argument(metavar="ARTIFACT...", help="Folders that export wrote.")],
    target: OptionalTarget = None,
    prompt: Annotated[int | None, typer.Option("--prompt", metavar="N", help="Tokens of the prompt.")] = None,
    generate: Annotated[int | None, typer.Option("--generate", metavar="N", help="Tokens to generate.")] = None,
    batch: Annotated[int | None, typer.Option("--batch", metavar="N", help="Sequences at once.")] = None,
    rounds: Annotated[int, typer.Option("--rounds", metavar="N", min=1, help="How often each has its turn.")] = 5,
    baseline: Annotated[
        Path | None,
        typer.Option(
            "--baseline",
            metavar="ARTIFACT",
            help="What the others are compared with. Left out: the first.",
            rich_help_panel=_COMPARING,
        ),
    ] = None,
    metric: Annotated[
        str,
        typer.Option(
            "--metric",
            metavar="|".join(get_args(Metric)),
            help="What is compared.",
            autocompletion=complete_from(get_args(Metric)),
            rich_help_panel=_COMPARING,
        ),
    ] = "decode",
    fail_if_slower: Annotated[
        str | None,
        typer.Option(
            "--fail-if-slower",
            metavar="3%",
            help="Exit code 4 when one is slower than the baseline by more than this, for sure.",
            rich_help_panel=_COMPARING,
        ),
    ] = None,
    plot: Annotated[
        Path | None,
        typer.Option("--plot", metavar="F", help="Draw the ratios with their intervals.", rich_help_panel=_COMPARING),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Measure artifacts side by side, in turns.

    One at a time, so that a drifting machine favours none. A ratio is that of a typical round, with its 90 % interval.

    Target and workload, left out, are those of the first artifact.
    """
    from amoeba_export.backends import measure_latency
    from amoeba_export.backends.targets import read_target

    if metric not in get_args(Metric):
        raise BadValue("--metric", metric, f"one of: {', '.join(get_args(Metric))}")
    margin = None if fail_if_slower is None else _margin(fail_if_slower)
    folders = list(dict.fromkeys([baseline, *artifacts] if baseline else artifacts))
    manifests = [read_manifest(artifact) for artifact in folders]
    first = manifests[0].latency
    usual = first.workload if first else Workload()
    workload = Workload(
        prompt_tokens=prompt or usual.prompt_tokens,
        generate_tokens=generate or usual.generate_tokens,
        batch=batch or usual.batch,
    )
    found = read_target(target or (first.target if first else "cpu"))
    subjects = [_subject(artifact, manifest) for artifact, manifest in zip(folders, manifests, strict=True)]
    talk = Talk()
    talk.note(
        f"{len(subjects)} artifact{'s' * (len(subjects) > 1)} on {found.name}, {rounds} rounds, prompt "
        f"{workload.prompt_tokens}, generate {workload.generate_tokens}, batch {workload.batch}"
    )
    results = measure_latency(subjects, workload, target=found, progress=talk, rounds=rounds)
    compared = [_compared(result, results[0], metric) for result in results]  # type: ignore[arg-type]
    rows = list(zip(folders, manifests, results, compared, strict=True))
    if as_json:
        print_json([_to_json(*row, metric=metric, margin=margin) for row in rows])
    else:
        _show(rows, metric)
    if plot:
        _plot(rows, metric, margin, plot)
    for result in results:
        if isinstance(result, TargetError):
            raise result
    if margin is not None:
        _judge(rows, metric, margin, talk)


_Row = tuple[Path, Manifest, "Latency | TargetError", "Comparison | None"]


def _margin(text: str) -> float:
    match = re.fullmatch(r"(\d+(?:\.\d+)?|\.\d+)\s*%", text.strip())
    if not match:
        raise BadValue("--fail-if-slower", text, "a percentage, such as 3%")
    return float(match[1]) / 100


def _subject(artifact: Path, manifest: Manifest) -> Subject:
    from amoeba_export.application.request import read_plan
    from amoeba_export.backends import Subject

    dense = read_plan(artifact).dense(manifest.architecture())
    return Subject(dense=dense, artifact=artifact, dtype=manifest.dtype, label=f"'{artifact}'")


def _compared(result: Latency | TargetError, first: Latency | TargetError, metric: Metric) -> Comparison | None:
    """How the first compares with itself is not worth an interval, nor is an estimate: its ratio is exact."""
    from amoeba_export.profile import Comparison, compare_rounds

    if isinstance(result, TargetError) or isinstance(first, TargetError):
        return None
    ours, theirs = result.rounds_of(metric), first.rounds_of(metric)
    if result is first or not ours or not theirs:
        ratio = result.of(metric) / first.of(metric)
        return Comparison(ratio=ratio, low=ratio, high=ratio, rounds=len(ours))
    return compare_rounds(ours, theirs)


def _judge(rows: Sequence[_Row], metric: str, margin: float, talk: Talk) -> None:
    """Raise for what is slower, and say what could not be decided."""
    slower = []
    for artifact, _, _, comparison in rows[1:]:
        assert comparison is not None, "a failed measurement was raised before"
        verdict = comparison.verdict(margin)
        what = f"{metric} of '{artifact}' takes {_ratio(comparison)} times as long as of '{rows[0][0]}'"
        if verdict == "slower":
            slower.append(what[0].upper() + what[1:])
        elif verdict == "undecided":
            needed = comparison.rounds_to_decide(margin)
            more = f" About {needed} rounds would tell (--rounds)." if needed else " More rounds would tell (--rounds)."
            talk.warn(f"Undecided: {what}, and {percent(margin)} more is allowed.{more}")
    if slower:
        raise SlowerThanBaseline(slower, f"{percent(margin)} more")


def _ratio(comparison: Comparison) -> str:
    if comparison.low == comparison.high:
        return f"{comparison.ratio:.3f}"
    if not math.isfinite(comparison.high):
        return f"{comparison.ratio:.3f} (too few rounds for an interval)"
    return f"{comparison.ratio:.3f} ({comparison.low:.3f} to {comparison.high:.3f})"


def _show(rows: Sequence[_Row], metric: str) -> None:
    figures = ("size", "decode p50", "p90", "noise", "tokens/s", "prefill p50", "memory", f"{metric} ratio")
    shown = table("artifact", "shape", "dtype", *figures, right=figures)
    for artifact, manifest, result, comparison in rows:
        cells = [str(artifact), str(manifest.shape.shape), manifest.dtype, size(_size_bytes(manifest))]
        if isinstance(result, Latency):
            noise = result.decode.noise
            cells += [
                milliseconds(result.decode.p50_ms),
                milliseconds(result.decode.p90_ms),
                "-" if noise is None else percent(noise),
                f"{1000 * result.workload.batch / result.decode.p50_ms:.1f}",
                milliseconds(result.prefill.p50_ms),
                "-" if result.memory_mb is None else f"{result.memory_mb:.0f} MiB",
                "-" if comparison is None else _ratio(comparison),
            ]
        else:
            cells += ["failed"]
        shown.add_row(*cells)
    console = answer()
    console.print(shown)
    estimate = next(
        (one.source for _, _, one, _ in rows if isinstance(one, Latency) and one.source != "measured"), None
    )
    if estimate is not None:
        console.print(f"These are estimates ({estimate}): no device was asked.")


def _plot(rows: Sequence[_Row], metric: str, margin: float | None, path: Path) -> None:
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise InputError(
            "The plot needs matplotlib, which is not installed.",
            next_step="Install it with: pip install 'amoeba-export[report]', or leave --plot out.",
        ) from error
    drawn = [(str(artifact), one) for artifact, _, _, one in rows if one is not None][::-1]
    figure = Figure(figsize=(7, 1.2 + 0.5 * len(drawn)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for height, (_, one) in enumerate(drawn):
        ends = [[one.ratio - one.low], [one.high - one.ratio]] if math.isfinite(one.high) else None
        axes.errorbar(one.ratio, height, xerr=ends, fmt="o", capsize=4, color="C0")
    axes.axvline(1.0, color="0.5", linewidth=1)
    if margin is not None:
        axes.axvline(1 + margin, color="C3", linewidth=1, linestyle="--", label=f"{percent(margin)} slower")
        axes.legend()
    axes.set_yticks(range(len(drawn)), [name for name, _ in drawn])
    axes.set_ylim(-0.5, len(drawn) - 0.5)
    axes.set_xlabel(f"{metric} time over that of {drawn[-1][0]}, with 90 % interval")
    axes.grid(axis="x", alpha=0.3)
    figure.savefig(path, dpi=120, metadata={"Software": None} if path.suffix.lower() == ".png" else None)


def _to_json(
    artifact: Path,
    manifest: Manifest,
    result: Latency | TargetError,
    comparison: Comparison | None,
    *,
    metric: str,
    margin: float | None,
) -> dict[str, Any]:
    data: dict[str, Any] = {
        "artifact": str(artifact),
        "shape": str(manifest.shape.shape),
        "dtype": manifest.dtype,
        "size_bytes": _size_bytes(manifest),
    }
    if isinstance(result, TargetError):
        return {**data, "error": result.what}
    data |= {
        "source": result.source,
        "decode_ms": {"p50": result.decode.p50_ms, "p90": result.decode.p90_ms},
        "decode_noise": result.decode.noise,
        "prefill_ms": {"p50": result.prefill.p50_ms, "p90": result.prefill.p90_ms},
        "memory_mb": result.memory_mb,
        "device": dict(result.device),
    }
    if comparison is not None:
        has_interval = math.isfinite(comparison.high)
        data["comparison"] = {
            "metric": metric,
            "ratio": comparison.ratio,
            "interval": [comparison.low, comparison.high] if has_interval else None,
            "confidence": 0.9,
            "rounds": comparison.rounds,
            "verdict": None if margin is None else comparison.verdict(margin),
        }
    return data


def _size_bytes(manifest: Manifest) -> int:
    return sum(file.size_bytes for file in manifest.files)
