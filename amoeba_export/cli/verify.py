"""`amoeba verify`: an artifact against its checksums and provenance, and against the supernet that it was cut from."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from amoeba_export.cli.artifacts import verified
from amoeba_export.cli.console import Talk, answer, print_json
from amoeba_export.cli.options import Adapters, AsJson


def verify(
    artifact: Annotated[Path, typer.Argument(metavar="ARTIFACT", help="Folder of an artifact.")],
    model: Annotated[
        str | None,
        typer.Option("--model", metavar="MODEL", help="The supernet. Default: the one that the manifest names."),
    ] = None,
    strategy: Annotated[
        Path | None,
        typer.Option("--strategy", metavar="F", help="The strategy of the artifact, if it is not in the cache."),
    ] = None,
    adapter: Adapters = None,
    refit: Annotated[
        Path | None,
        typer.Option("--refit", metavar="F", help="The refit of the artifact, if it is not in the cache."),
    ] = None,
    rounding: Annotated[
        Path | None,
        typer.Option(
            "--rounding", metavar="F", help="The rounded weights of the artifact, if they are not in the cache."
        ),
    ] = None,
    checksums_only: Annotated[
        bool,
        typer.Option(
            "--checksums-only", help="Compare only the files with the manifest and the provenance. Needs no supernet."
        ),
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Check an artifact against its checksums, its provenance statement and its supernet.

    The artifact must be complete, and compute the same as the masked supernet. Exit code 3: a file is missing or
    changed, or the statement contradicts it. Exit code 5: the numbers differ.
    """
    from amoeba_export.application.verify import verify as run

    found = run(
        artifact,
        model=model,
        strategy=strategy,
        adapters=tuple(adapter or ()),
        refit=refit,
        rounding=rounding,
        checksums_only=checksums_only,
        progress=Talk(),
    )
    record = found.verification
    if as_json:
        data: dict[str, Any] = {"artifact": str(artifact), "files_ok": True, "provenance_ok": True}
        print_json(data if record is None else {**data, "verification": record.to_json()})
        return
    num_files = f"{len(found.manifest.files)} files are as they were written and as the provenance statement says"
    answer().print(f"{artifact}: {num_files}{'' if record is None else f'; {verified(record)}'}.")
