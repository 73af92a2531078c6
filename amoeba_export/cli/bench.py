"""`amoeba bench`: artifacts side by side, measured in turns in one run."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from amoeba_export.artifact import Manifest, read_manifest
from amoeba_export.cli.console import Talk, answer, milliseconds, percent, print_json, size, table
from amoeba_export.cli.options import AsJson, OptionalTarget
from amoeba_export.errors import TargetError
from amoeba_export.ir import Latency, Workload

if TYPE_CHECKING:
    from amoeba_export.backends import Subject


def bench(
    artifacts: Annotated[list[Path], typer.Argument(metavar="ARTIFACT...", help="Folders that export wrote.")],
    target: OptionalTarget = None,
    prompt: Annotated[int | None, typer.Option("--prompt", metavar="N", help="Tokens of the prompt.")] = None,
    generate: Annotated[int | None, typer.Option("--generate", metavar="N", help="Tokens to generate.")] = None,
    batch: Annotated[int | None, typer.Option("--batch", metavar="N", help="Sequences at once.")] = None,
    rounds: Annotated[int, typer.Option("--rounds", metavar="N", min=1, help="How often each has its turn.")] = 3,
    as_json: AsJson = False,
) -> None:
    """Measure artifacts side by side, in turns.

    One at a time, so that a drifting machine favours none.

    Target and workload, left out, are those of the first artifact.
    """
    from amoeba_export.backends import measure_latency
    from amoeba_export.backends.targets import read_target

    manifests = [read_manifest(artifact) for artifact in artifacts]
    first = manifests[0].latency
    usual = first.workload if first else Workload()
    workload = Workload(
        prompt_tokens=prompt or usual.prompt_tokens,
        generate_tokens=generate or usual.generate_tokens,
        batch=batch or usual.batch,
    )
    found = read_target(target or (first.target if first else "cpu"))
    subjects = [_subject(artifact, manifest) for artifact, manifest in zip(artifacts, manifests, strict=True)]
    talk = Talk()
    talk.note(
        f"{len(subjects)} artifact{'s' * (len(subjects) > 1)} on {found.name}, {rounds} rounds, prompt "
        f"{workload.prompt_tokens}, generate {workload.generate_tokens}, batch {workload.batch}"
    )
    results = measure_latency(subjects, workload, target=found, progress=talk, rounds=rounds)
    if as_json:
        print_json([_to_json(*one) for one in zip(artifacts, manifests, results, strict=True)])
    else:
        _show(artifacts, manifests, results)
    for result in results:
        if isinstance(result, TargetError):
            raise result


def _subject(artifact: Path, manifest: Manifest) -> Subject:
    from amoeba_export.backends import Subject
    from amoeba_export.request import read_plan

    dense = read_plan(artifact).dense(manifest.architecture())
    return Subject(dense=dense, artifact=artifact, dtype=manifest.dtype, label=f"'{artifact}'")


def _show(artifacts: list[Path], manifests: list[Manifest], results: list[Latency | TargetError]) -> None:
    figures = ("size", "decode p50", "p90", "noise", "tokens/s", "prefill p50", "memory", "decode ratio")
    shown = table("artifact", "shape", "dtype", *figures, right=figures)
    reference = next((result for result in results if isinstance(result, Latency)), None)
    for artifact, manifest, result in zip(artifacts, manifests, results, strict=True):
        cells = [str(artifact), str(manifest.shape.shape), manifest.dtype, size(_size_bytes(manifest))]
        if isinstance(result, Latency):
            assert reference is not None
            noise = result.decode.noise
            cells += [
                milliseconds(result.decode.p50_ms),
                milliseconds(result.decode.p90_ms),
                "-" if noise is None else percent(noise),
                f"{1000 * result.workload.batch / result.decode.p50_ms:.1f}",
                milliseconds(result.prefill.p50_ms),
                "-" if result.memory_mb is None else f"{result.memory_mb:.0f} MiB",
                f"{result.decode.p50_ms / reference.decode.p50_ms:.3f}",
            ]
        else:
            cells += ["failed"]
        shown.add_row(*cells)
    console = answer()
    console.print(shown)
    if reference is not None and reference.source != "measured":
        console.print(f"These are estimates ({reference.source}): no device was asked.")


def _to_json(artifact: Path, manifest: Manifest, result: Latency | TargetError) -> dict[str, Any]:
    data: dict[str, Any] = {
        "artifact": str(artifact),
        "shape": str(manifest.shape.shape),
        "dtype": manifest.dtype,
        "size_bytes": _size_bytes(manifest),
    }
    if isinstance(result, TargetError):
        return {**data, "error": result.what}
    return {
        **data,
        "source": result.source,
        "decode_ms": {"p50": result.decode.p50_ms, "p90": result.decode.p90_ms},
        "decode_noise": result.decode.noise,
        "prefill_ms": {"p50": result.prefill.p50_ms, "p90": result.prefill.p90_ms},
        "memory_mb": result.memory_mb,
        "device": dict(result.device),
    }


def _size_bytes(manifest: Manifest) -> int:
    return sum(file.size_bytes for file in manifest.files)
