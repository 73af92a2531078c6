"""A check as one call: an artifact against its checksums and provenance, and against the supernet it was cut from."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from amoeba_export.application.manifest import verification_record
from amoeba_export.application.recheck import check_story, recheck
from amoeba_export.application.refits import holding_refit
from amoeba_export.application.rounded import holding_rounded
from amoeba_export.application.selection import STRATEGY_NAME
from amoeba_export.artifact import Manifest, VerificationRecord, sha256_file, verify_checksums
from amoeba_export.cache import Cache
from amoeba_export.errors import AmoebaError, NotFound, OtherInputs
from amoeba_export.ir import SILENT, Progress, SubnetPlan, Supernet
from amoeba_export.load import load_supernet

CUT_FROM = ("model", "strategy", "adapter")
"""Roles of the inputs that decide an artifact's weights. A target or a quality file only decided which shape it has."""


@dataclass(frozen=True, kw_only=True)
class Verified:
    """An artifact that is whole and tells one story.

    Attributes:
        artifact: Its folder.
        manifest: What it says that it is.
        plan: Which weights it keeps.
        verification: How near it is to the masked supernet; None where only the files were compared.
    """

    artifact: Path
    manifest: Manifest
    plan: SubnetPlan
    verification: VerificationRecord | None


def verify(
    artifact: Path,
    *,
    model: str | None = None,
    strategy: Path | None = None,
    adapters: tuple[Path, ...] = (),
    refit: Path | None = None,
    rounding: Path | None = None,
    checksums_only: bool = False,
    progress: Progress = SILENT,
) -> Verified:
    """Check that an artifact is whole, and computes what the masked supernet computes.

    The supernet is the one that it was cut from and no other: by content, input for input.

    Args:
        artifact: A folder that export wrote.
        model: The supernet; None for what the manifest names.
        strategy: The strategy that it was cut by; None for the cached one.
        adapters: Those that it was cut with; empty for what lies where the manifest's names say.
        refit: The refit that it was made with; None for the cached one.
        rounding: The rounded weights that it was made with; None for the cached ones.
        checksums_only: Only compare the files with the manifest and the provenance statement; needs no supernet.
        progress: Told what is being compared.

    Raises:
        InputError: A file is missing or changed, the statement says otherwise, or an input is not there or another.
        VerificationError: The numbers differ.
    """
    manifest = verify_checksums(artifact)
    plan = check_story(artifact, manifest)
    if checksums_only:
        return Verified(artifact=artifact, manifest=manifest, plan=plan, verification=None)
    name = model or next((item.id for item in manifest.inputs if item.role == "model"), manifest.model)
    if strategy is None and plan.strategy_id is not None:
        strategy = _cached_strategy(plan.strategy_id)
    try:
        load_supernet(name, progress=progress)
    except NotFound as error:
        if model is not None:
            raise
        raise NotFound("The artifact's supernet", name, next_step="Say where it is with --model.") from error
    adapters = adapters or tuple(_adapters(artifact, manifest, name))
    supernet = load_supernet(name, adapters=adapters, strategy=strategy, progress=progress)
    if differences := _differences(manifest, supernet):
        raise OtherInputs(artifact, differences)
    supernet = supernet.with_head_tokens(plan.head_tokens)
    supernet = holding_refit(supernet, plan, refit, Cache(), progress=progress)
    rounded = holding_rounded(manifest, plan, rounding, Cache(), progress=progress)
    report = recheck(artifact, manifest, plan, supernet, rounded=rounded, progress=progress)
    record = verification_record(report)
    return Verified(artifact=artifact, manifest=manifest, plan=plan, verification=record)


def _differences(manifest: Manifest, supernet: Supernet) -> list[str]:
    """What the artifact was cut from that is not here, and what is here instead."""
    wanted = {(item.role, item.sha256): item for item in manifest.inputs if item.role in CUT_FROM}
    given = {(item.role, item.sha256): item for item in supernet.inputs}
    missing = [item for key, item in wanted.items() if key not in given]
    other = [item for key, item in given.items() if key not in wanted]
    return [f"it was cut with the {item.role} {item.id} ({item.sha256[:12]})" for item in missing] + [
        f"here is the {item.role} {item.id} ({item.sha256[:12]})" for item in other
    ]


def _adapters(artifact: Path, manifest: Manifest, model: str) -> Iterator[Path]:
    """The adapters that the artifact was cut with: by name where they are likely to lie, then by content.

    A manifest says no paths, so that the same inputs give the same bytes on every machine. Raises `NotFound`.
    """
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
    for path in Cache().root.glob(f"*/*/{STRATEGY_NAME}"):
        if sha256_file(path) == strategy_id:
            return path
    raise NotFound(
        "The strategy that the artifact was cut by",
        f"sha256 {strategy_id}",
        next_step="Say where it is with --strategy; the cache does not have it.",
    )
