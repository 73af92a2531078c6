"""`amoeba verify`: an artifact against its checksums and provenance, and against the supernet that it was cut from."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer

from amoeba_export.artifact import Manifest, sha256_file, verify_checksums
from amoeba_export.cache import Cache
from amoeba_export.cli.artifacts import verified
from amoeba_export.cli.console import Talk, answer, print_json
from amoeba_export.cli.options import Adapters, AsJson
from amoeba_export.errors import AmoebaError, NotFound, OtherInputs
from amoeba_export.ir import Supernet

CUT_FROM = ("model", "strategy", "adapter")
"""Roles of the inputs that decide an artifact's weights. A target or a quality file only decided which shape it has."""


def verify(
    artifact: Annotated[Path, typer.Argument(metavar="ARTIFACT", help="A folder that export wrote.")],
    model: Annotated[
        str | None, typer.Option("--model", metavar="MODEL", help="The supernet. Left out: what the manifest names.")
    ] = None,
    strategy: Annotated[
        Path | None,
        typer.Option("--strategy", metavar="F", help="The strategy that it was cut by, if it is not in the cache."),
    ] = None,
    adapter: Adapters = None,
    checksums_only: Annotated[
        bool,
        typer.Option(
            "--checksums-only", help="Only compare the files with the manifest and the provenance; needs no supernet."
        ),
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Check an artifact against its checksums, its provenance statement and its supernet.

    It must be whole, and compute what the masked supernet computes. Exit code 3 when a file is missing or changed, or
    when the statement says otherwise; 5 when the numbers differ.
    """
    from amoeba_export.application.recheck import check_story, recheck

    manifest = verify_checksums(artifact)
    plan = check_story(artifact, manifest)
    num_files = f"{len(manifest.files)} files are as they were written and as the provenance statement says"
    if checksums_only:
        if as_json:
            print_json({"artifact": str(artifact), "files_ok": True, "provenance_ok": True})
        else:
            answer().print(f"{artifact}: {num_files}.")
        return
    from amoeba_export.application.manifest import verification_record

    talk = Talk()
    supernet = _supernet(artifact, manifest, model, strategy, plan.strategy_id, tuple(adapter or ()), talk)
    record = verification_record(recheck(artifact, manifest, plan, supernet, progress=talk))
    if as_json:
        print_json(
            {
                "artifact": str(artifact),
                "files_ok": True,
                "provenance_ok": True,
                "verification": record.to_json(),
            }
        )
    else:
        answer().print(f"{artifact}: {num_files}; {verified(record)}.")


def _supernet(
    artifact: Path,
    manifest: Manifest,
    model: str | None,
    strategy: Path | None,
    strategy_id: str | None,
    adapters: tuple[Path, ...],
    talk: Talk,
) -> Supernet:
    """The supernet that the artifact was cut from, and no other: by content, input for input."""
    from amoeba_export.load import load_supernet

    name = model or next((item.id for item in manifest.inputs if item.role == "model"), manifest.model)
    if strategy is None and strategy_id is not None:
        strategy = _cached_strategy(strategy_id)
    try:
        load_supernet(name, progress=talk)
    except NotFound as error:
        if model is not None:
            raise
        raise NotFound("The artifact's supernet", name, next_step="Say where it is with --model.") from error
    adapters = adapters or tuple(_adapters(artifact, manifest, name))
    supernet = load_supernet(name, adapters=adapters, strategy=strategy, progress=talk)
    wanted = {(item.role, item.sha256): item for item in manifest.inputs if item.role in CUT_FROM}
    given = {(item.role, item.sha256): item for item in supernet.inputs}
    differences = [
        f"it was cut with the {item.role} {item.id} ({item.sha256[:12]})"
        for key, item in wanted.items()
        if key not in given
    ]
    differences += [
        f"here is the {item.role} {item.id} ({item.sha256[:12]})" for key, item in given.items() if key not in wanted
    ]
    if differences:
        raise OtherInputs(artifact, differences)
    return supernet


def _adapters(artifact: Path, manifest: Manifest, model: str) -> Iterator[Path]:
    """The adapters that the artifact was cut with: by name where they are likely to lie, then by content.

    A manifest says no paths, so that the same inputs give the same bytes on every machine. Raises `NotFound`.
    """
    from amoeba_export.load import load_supernet

    for item in manifest.inputs:
        if item.role != "adapter":
            continue
        places = (Path(), Path("adapters"), artifact.parent, artifact.parent.parent)
        found = [folder for place in places if (folder := place / Path(item.id).name).is_dir()]
        for folder in found:
            try:
                (adapter,) = load_supernet(model, adapters=(folder,)).adapters
            except AmoebaError:  # a folder of that name that is something else
                continue
            if adapter.input.sha256 == item.sha256:
                yield folder
                break
        else:
            seen = " (what is there by that name is another one)" if found else ""
            raise NotFound(
                "The adapter that the artifact was cut with",
                f"{item.id}, sha256 {item.sha256}{seen}",
                next_step=f"Say where it is with --adapter {item.id}.",
            )


def _cached_strategy(strategy_id: str) -> Path:
    """A strategy that export calibrated earlier, found by its content. Raises `NotFound`."""
    from amoeba_export.application.selection import STRATEGY_NAME

    for path in Cache().root.glob(f"*/*/{STRATEGY_NAME}"):
        if sha256_file(path) == strategy_id:
            return path
    raise NotFound(
        "The strategy that the artifact was cut by",
        f"sha256 {strategy_id}",
        next_step="Say where it is with --strategy; the cache does not have it.",
    )
