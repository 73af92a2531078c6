"""`amoeba bench`: artifacts side by side, measured in turns in one run.

Commands are long on purpose: each parameter is a flag, with its help.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_args

import typer

from amoeba_export.cli.completion import complete_from
from amoeba_export.cli.console import Talk, answer, milliseconds, percent, print_json, size, table
from amoeba_export.cli.options import AsJson, OptionalTarget
from amoeba_export.errors import BadValue, TargetError
from amoeba_export.ir import Latency, Metric
from amoeba_export.pictures import Ratio, check_picture, draw_ratios

if TYPE_CHECKING:
    from amoeba_export.application.bench import Benched

_COMPARING = "Comparing"


def bench(
    artifacts: Annotated[list[Path], typer.Argument(metavar="ARTIFACT...", help="Folders of artifacts.")],
    target: OptionalTarget = None,
    prompt: Annotated[int | None, typer.Option("--prompt", metavar="N", help="Number of prompt tokens.")] = None,
    generate: Annotated[
        int | None, typer.Option("--generate", metavar="N", help="Number of tokens to generate.")
    ] = None,
    batch: Annotated[int | None, typer.Option("--batch", metavar="N", help="Number of sequences in a batch.")] = None,
    rounds: Annotated[
        int, typer.Option("--rounds", metavar="N", min=1, help="Number of rounds; each measures every artifact once.")
    ] = 5,
    baseline: Annotated[
        Path | None,
        typer.Option(
            "--baseline",
            metavar="ARTIFACT",
            help="The artifact to compare with. Default: the first.",
            rich_help_panel=_COMPARING,
        ),
    ] = None,
    metric: Annotated[
        str,
        typer.Option(
            "--metric",
            metavar="|".join(get_args(Metric)),
            help="The latency to compare.",
            autocompletion=complete_from(get_args(Metric)),
            rich_help_panel=_COMPARING,
        ),
    ] = "decode",
    fail_if_slower: Annotated[
        str | None,
        typer.Option(
            "--fail-if-slower",
            metavar="3%",
            help="Exit with code 4 if the whole interval of an artifact is over this limit.",
            rich_help_panel=_COMPARING,
        ),
    ] = None,
    plot: Annotated[
        Path | None,
        typer.Option("--plot", metavar="F", help="Draw the ratios with their intervals.", rich_help_panel=_COMPARING),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Measure artifacts in turns and compare their latencies.

    Turns cancel the drift of the machine. A ratio is that of a typical round, with its 90 % interval.

    Target and workload default to those of the first artifact.
    """
    from amoeba_export.application.bench import bench as run
    from amoeba_export.application.bench import refuse_slower

    margin = None if fail_if_slower is None else _margin(fail_if_slower)
    if plot:
        check_picture(plot)
    talk = Talk()
    benched = run(
        [baseline, *artifacts] if baseline else artifacts,
        target=target,
        prompt_tokens=prompt,
        generate_tokens=generate,
        batch=batch,
        rounds=rounds,
        metric=metric,
        progress=talk,
    )
    if as_json:
        print_json([_to_json(one, margin) for one in benched])
    else:
        _show(benched, metric)
    if plot:
        _plot(benched, metric, margin, plot)
    for one in benched:
        if isinstance(one.result, TargetError):
            raise one.result
    if margin is not None:
        refuse_slower(benched, margin, progress=talk)


def _margin(text: str) -> float:
    match = re.fullmatch(r"(\d+(?:\.\d+)?|\.\d+)\s*%", text.strip())
    if not match:
        raise BadValue("--fail-if-slower", text, "a percentage, such as 3%")
    return float(match[1]) / 100


def _show(benched: Sequence[Benched], metric: str) -> None:
    figures = ("size", "decode p50", "p90", "noise", "tokens/s", "prefill p50", "memory", f"{metric} ratio")
    shown = table("artifact", "shape", "dtype", *figures, right=figures)
    for one in benched:
        manifest, result = one.manifest, one.result
        cells = [str(one.artifact), str(manifest.shape.shape), manifest.dtype, size(one.size_bytes)]
        if isinstance(result, Latency):
            noise = result.decode.noise
            cells += [
                milliseconds(result.decode.p50_ms),
                milliseconds(result.decode.p90_ms),
                "-" if noise is None else percent(noise),
                f"{1000 * result.workload.batch / result.decode.p50_ms:.1f}",
                milliseconds(result.prefill.p50_ms),
                "-" if result.memory_mb is None else f"{result.memory_mb:.0f} MiB",
                "-" if one.comparison is None else str(one.comparison),
            ]
        else:
            cells += ["failed"]
        shown.add_row(*cells)
    console = answer()
    console.print(shown)
    sources = (one.result.source for one in benched if isinstance(one.result, Latency))
    estimate = next((source for source in sources if source != "measured"), None)
    if estimate is not None:
        console.print(f"These are estimates ({estimate}): no device was asked.")


def _plot(benched: Sequence[Benched], metric: str, margin: float | None, path: Path) -> None:
    ratios = []
    for one in benched:
        if (comparison := one.comparison) is not None:
            low, high = (comparison.low, comparison.high) if math.isfinite(comparison.high) else (None, None)
            ratios.append(Ratio(name=str(one.artifact), ratio=comparison.ratio, low=low, high=high))
    draw_ratios(ratios, path, what=metric, margin=margin)


def _to_json(one: Benched, margin: float | None) -> dict[str, Any]:
    manifest, result, comparison = one.manifest, one.result, one.comparison
    data: dict[str, Any] = {
        "artifact": str(one.artifact),
        "shape": str(manifest.shape.shape),
        "dtype": manifest.dtype,
        "size_bytes": one.size_bytes,
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
            "metric": one.metric,
            "ratio": comparison.ratio,
            "interval": [comparison.low, comparison.high] if has_interval else None,
            "confidence": 0.9,
            "rounds": comparison.rounds,
            "verdict": None if margin is None else comparison.verdict(margin),
        }
    return data
