"""Refit and heal as calls of their own: a plan goes in, a file with fitted weights comes out."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

from amoeba_export.application.refits import (
    REFIT_NAME,
    healed,
    refitted,
    refitted_unless_worse,
    warned,
    with_named_refit,
)
from amoeba_export.application.request import ExportRequest
from amoeba_export.application.resolve import DEFAULT_REFIT, is_refit_file, resolve
from amoeba_export.application.selection import given_plan, with_strategy
from amoeba_export.application.session import Session, open_session
from amoeba_export.artifact import check_file_destination
from amoeba_export.cache.kinds import REFITS
from amoeba_export.errors import BadValue, NothingIsCut, UnknownName
from amoeba_export.ir import SILENT, Progress, Refit, SubnetPlan
from amoeba_export.load.refit import read_refit
from amoeba_export.refit import HEAL_RECIPE, OFF, shipped_refits
from amoeba_export.replacing import replacing


def refit(
    model: str = "demo",
    *,
    plan: Path,
    out: Path,
    refit: str = DEFAULT_REFIT,
    strategy: Path | None = None,
    recipe: str = "quick",
    adapters: tuple[Path, ...] = (),
    calibration_data: tuple[Path, ...] = (),
    seed: int = 0,
    progress: Progress = SILENT,
) -> Refit:
    """Fit what stays of `model` to do the work of what `plan` cuts, and write the fitted weights to `out`.

    `export --plan PLAN --refit OUT` takes them. A refit that was made before comes from the cache. One that raises the
    held-out loss is written, with a warning.

    Args:
        model: A model folder, a hub id, or `demo`.
        plan: A plan.json, the answer of `search --json`, or an artifact's folder. A refit that it names is not used.
        out: The file, such as `refit.safetensors`. Replaced when it exists.
        refit: `fast` or `full`.
        strategy: What calibration found; None for the cached one of `recipe`.
        recipe: The calibration, where there is no strategy.
        adapters: LoRA or SMoL adapters, in order. The full model with them is the teacher.
        calibration_data: Texts of the user's own domain, for half of the tokens.
        seed: Of the draws of samples.
        progress: Told of everything that takes time.

    Raises:
        UsageError: `out` is a folder, there is no such recipe, or the plan cuts nothing.
        InputError: The model, the plan or the texts cannot be used.
    """
    # Long on purpose: the parameters are settings of a request, those that a refit knows.
    known = tuple(name for name in shipped_refits() if name != HEAL_RECIPE)
    if refit not in known:
        raise UnknownName("refit", refit, known)
    check_file_destination(out)
    request = ExportRequest(
        model=model,
        plan=plan,
        refit=refit,
        strategy=strategy,
        recipe=recipe,
        adapters=adapters,
        calibration_data=calibration_data,
        seed=seed,
    )
    session, given = _opened(request, progress)
    session, (named,) = refitted(session, [dataclasses.replace(given, refit_id=None)], refit)
    warned(session, named, "The cut is better without it.")
    return _written(session, named, out)


def heal(
    model: str = "demo",
    *,
    plan: Path,
    out: Path,
    heal: str,
    refit: str = DEFAULT_REFIT,
    strategy: Path | None = None,
    recipe: str = "quick",
    adapters: tuple[Path, ...] = (),
    calibration_data: tuple[Path, ...] = (),
    seed: int = 0,
    progress: Progress = SILENT,
) -> Refit:
    """Distil the cut of `plan` from the full model, from its refit on, and write its weights to `out`.

    A refit that is made for it and raises the held-out loss is left out, as `export` does.

    Args:
        model: A model folder, a hub id, or `demo`.
        plan: A plan.json, the answer of `search --json`, or the folder of an artifact. It starts at the refit that the
            plan names.
        out: The file, such as `healed.safetensors`. Replaced when it exists.
        heal: How long: `20m`, or tokens such as `2Mtok`.
        refit: Where it starts, if the plan names none: `fast`, `full` or a file.
        strategy: What calibration found; None for the cached one of `recipe`.
        recipe: The calibration, where there is no strategy.
        adapters: LoRA or SMoL adapters, in order. The full model with them is the teacher.
        calibration_data: Texts of the user's own domain, for half of the tokens.
        seed: Of the draws of samples.
        progress: Told of everything that takes time.

    Raises:
        UsageError: `out` is a folder, `heal` or `refit` cannot be read, or the plan cuts nothing.
        InputError: The model, the plan or the texts cannot be used.
    """
    # Long on purpose: the parameters are settings of a request, those that healing knows.
    if refit == OFF:
        raise UnknownName("refit", refit, tuple(name for name in shipped_refits() if name != HEAL_RECIPE))
    if heal == OFF:
        raise BadValue("--heal", heal, "a time such as 20m, or tokens such as 2Mtok")
    check_file_destination(out)
    request = ExportRequest(
        model=model,
        plan=plan,
        refit=refit,
        heal=heal,
        strategy=strategy,
        recipe=recipe,
        adapters=adapters,
        calibration_data=calibration_data,
        seed=seed,
    )
    session, given = _opened(request, progress)
    session, named = with_named_refit(session, given)
    if named.refit_id is None:
        assert not is_refit_file(refit), "or it is named"
        session, named = refitted_unless_worse(session, named, refit)
    session, named = healed(session, named)
    warned(session, named, "The cut is better without it.")
    return _written(session, named, out)


def _opened(request: ExportRequest, progress: Progress) -> tuple[Session, SubnetPlan]:
    session = with_strategy(open_session(resolve(request), progress=progress))
    plan = given_plan(session)
    if plan.keeps_everything(session.architecture):
        raise NothingIsCut(str(request.plan))
    return session, plan


def _written(session: Session, plan: SubnetPlan, out: Path) -> Refit:
    """The refit that `plan` names, copied from the cache to `out`."""
    folder = session.cache.get(REFITS, {"sha256": plan.refit_id}, progress=session.progress)
    assert folder is not None, "put there a moment ago"
    with replacing(out) as part:
        shutil.copyfile(folder / REFIT_NAME, part)
    return read_refit(out)
