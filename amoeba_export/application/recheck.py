"""An artifact that was published, checked again: does everything in it tell one story, and is the story true?

`verify_checksums` compares the files with the manifest. Here the manifest is compared with the plan (`check_story`),
and both with the supernet and the content of the files (`recheck`).
"""

from __future__ import annotations

from pathlib import Path

from amoeba_export.application.resolve import read_plan
from amoeba_export.artifact import MANIFEST_NAME, PLAN_NAME, Manifest, ShapeRecord
from amoeba_export.errors import NotAsWritten
from amoeba_export.formats import FORMATS
from amoeba_export.ir import SILENT, Progress, SubnetPlan, Supernet, validate
from amoeba_export.ir.dtype import SOURCE, float_name, written_as
from amoeba_export.ir.rounded import RoundedWeights
from amoeba_export.model.foreign_code import refuse_foreign_code
from amoeba_export.reading import as_json
from amoeba_export.verify import VerifyReport, sidecar_problems, verify_artifact


def check_story(folder: Path, manifest: Manifest) -> SubnetPlan:
    """The plan of an artifact, which must be one for the dims of the manifest, and the one that the manifest counts.

    Raises:
        ForeignCode: There is code in it that is not amoeba's, or the name of some.
        InputError: The plan or the manifest's dims are not valid.
        NotAsWritten: They contradict each other, or there are files of a format that we do not have.
    """
    refuse_foreign_code(folder)
    plan = read_plan(folder)
    validate(plan, manifest.architecture())
    problems = []
    if (counted := ShapeRecord.of(plan)) != manifest.shape:
        what = f"shape {manifest.shape.depth}x{manifest.shape.width:g}"
        if (counted.depth, counted.width) == (manifest.shape.depth, manifest.shape.width):
            what = "other layers"
        problems.append(f"{MANIFEST_NAME} says {what} and {PLAN_NAME} keeps {plan.shape}")
    told = {manifest.architecture().head_rows, manifest.vocabulary.tokens if manifest.vocabulary else None}
    if told != {len(plan.head_tokens) if plan.head_tokens else None}:
        problems.append(f"{MANIFEST_NAME} counts other tokens that logits are computed of than {PLAN_NAME}")
    formats = {file.path.split("/")[0] for file in manifest.files if "/" in file.path}
    problems += [f"{name} is a folder of no format" for name in sorted(formats - set(FORMATS))]
    problems += [] if formats else ["it has no format"]
    model = [item for item in manifest.inputs if item.role == "model"]
    if [item.id for item in model] != [manifest.model]:
        problems.append(f"{MANIFEST_NAME} says model {manifest.model} and names {len(model)} as input")
    for role, known in (("model", plan.model_id), ("strategy", plan.strategy_id)):
        named = {item.sha256 for item in manifest.inputs if item.role == role}
        if known is not None and known not in named:
            problems.append(f"{PLAN_NAME} is for the {role} {known[:12]}, which {MANIFEST_NAME} does not name")
    if problems:
        raise NotAsWritten(folder, problems)
    return plan


def recheck(
    folder: Path,
    manifest: Manifest,
    plan: SubnetPlan,
    supernet: Supernet,
    *,
    rounded: RoundedWeights | None = None,
    progress: Progress = SILENT,
) -> VerifyReport:
    """Compare what is in an artifact with the supernet that it was cut from.

    Args:
        folder: The artifact.
        manifest: Its manifest.
        plan: Its plan, from `check_story`.
        supernet: By content that of the manifest, with its adapters and the strategy.
        rounded: The integers that the manifest names, if it names some.
        progress: Told what is being compared.

    Raises:
        NotAsWritten: The manifest's dims or dtype are not those of the supernet and the files, or a tokenizer is not
            the supernet's.
        VerificationError: A format does not compute what it should.
    """
    problems = []
    dims = as_json(supernet.architecture.facts())
    for key in {**dims, **manifest.dims}:
        if manifest.dims.get(key) != dims.get(key):
            problems.append(f"{MANIFEST_NAME} says {key} = {manifest.dims.get(key)!r}, the model has {dims.get(key)!r}")
    for name in FORMATS:
        if (folder / name).is_dir():
            problems += [f"{name}/{problem}" for problem in sidecar_problems(folder / name, supernet)]
    if problems:
        raise NotAsWritten(folder, problems)
    report = verify_artifact(folder, supernet, plan, rounded=rounded, progress=progress)
    written = {one.format: one.dtype for one in report.formats}
    able = [name for name in written if manifest.dtype in FORMATS[name].dtypes]
    is_there = any(written[name] == manifest.dtype for name in able)
    for name, dtype in written.items():
        # Formats that are not asked for a dtype each take their own, and the manifest says that of the first.
        is_own = (is_there or name not in able) and dtype in _own_dtypes(name, supernet)
        if dtype != manifest.dtype and not is_own:
            problems.append(f"{name} is in {dtype}, and {MANIFEST_NAME} says {manifest.dtype}")
    if problems:
        raise NotAsWritten(folder, problems)
    return report


def _own_dtypes(format_name: str, supernet: Supernet) -> set[str]:
    """What a format is written in where no dtype is asked for: the types of the weights, if it keeps them."""
    own = FORMATS[format_name].default_dtype
    if own != SOURCE:
        return {own}
    return {float_name(written_as(supernet.tensors.dtype(name))) for name in supernet.tensors.names()}
