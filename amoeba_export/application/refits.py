"""Fitted weights of plans: found in the cache by content, or made and kept there. Plans name them."""

from __future__ import annotations

import dataclasses
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from amoeba_export.application.session import Session
from amoeba_export.cache import Cache
from amoeba_export.cache.kinds import RECOVERIES, REFITS
from amoeba_export.errors import NotFound, RefitDiffers
from amoeba_export.ir import SILENT, InputId, Progress, Refit, SubnetPlan, Supernet
from amoeba_export.load.refit import read_refit, write_refit
from amoeba_export.materialize import materialize_subnet
from amoeba_export.refit import HEAL_RECIPE, HEALED_UP_TO, OFF, Draw
from amoeba_export.refit.heal import heal
from amoeba_export.refit.stage import Refitted, adapter_ids, refit

LEAST_HARM = 0.02
"""Nats by which a refit or a heal may raise the held-out loss, and still be taken: less is noise."""

REFIT_NAME = "refit.safetensors"
ID_NAME = "id.json"


def refitted(session: Session, plans: Sequence[SubnetPlan], recipe_name: str) -> tuple[Session, list[SubnetPlan]]:
    """The plans with the names of their refits, and a session that has these: found in the cache, or made together."""
    draw = session.draw(recipe_name)
    recipe = draw.recipe
    facts = {plan.geometry: _facts(session, plan, draw, kind="refit") for plan in plans}
    found = {geometry: _cached(session, one) for geometry, one in facts.items()}
    missing = {plan.geometry: plan for plan in plans if found[plan.geometry] is None}
    if missing:
        session.progress.note(
            f"Refitting with the recipe '{recipe.name}': {recipe.tokens} tokens, "
            f"{len(missing)} {'plan' if len(missing) == 1 else 'plans'}."
        )

        def keep(made: Sequence[Refitted]) -> None:
            for one in made:
                found[one.plan.geometry] = _put(session, one, facts[one.plan.geometry])

        refit(session.supernet, list(missing.values()), draw, take=keep, host=session.host)
    named = []
    for plan in plans:
        held = found[plan.geometry]
        assert held is not None, "made or found above"
        session.progress.note(_told(plan, held))
        session = _with(session, held)
        named.append(dataclasses.replace(plan, refit_id=held.identity))
    return session, named


def refitted_unless_worse(session: Session, plan: SubnetPlan, recipe_name: str) -> tuple[Session, SubnetPlan]:
    """The plan with the name of its refit, as `refitted` has it; unchanged, with a warning, where the cut is better."""
    made, (named,) = refitted(session, [plan], recipe_name)
    return (session, plan) if warned(made, named, "The cut keeps its own weights.") else (made, named)


def healed_unless_worse(session: Session, plan: SubnetPlan) -> tuple[Session, SubnetPlan]:
    """The plan as `healed` has it; unchanged, with a warning, where it was better before."""
    made, named = healed(session, plan)
    if named.refit_id == plan.refit_id:
        return made, named
    return (session, plan) if warned(made, named, "The cut keeps the weights that it had.") else (made, named)


def warned(session: Session, plan: SubnetPlan, consequence: str) -> bool:
    """Whether the cut is better without the refit that `plan` names: then it is said, and what comes of that."""
    held = session.supernet.refits[plan.refit_id or ""]
    if is_worse(held):
        session.progress.warn(
            f"The {held.kind} raises the held-out loss by {rise_by(held):.3f} nats. {consequence} More tokens may "
            f"help: {'a longer --heal' if held.kind == 'heal' else '--refit full'}, or your own texts with "
            "--calibration-data."
        )
    return is_worse(held)


def is_worse(held: Refit) -> bool:
    """Whether the cut is better without this refit: by the held-out loss, mean over the texts."""
    return rise_by(held) > LEAST_HARM


def rise_by(held: Refit) -> float:
    """Of the held-out loss, in nats: what a refit adds to that of the cut, mean over the texts; less than 0 is good."""
    return fmean(losses["refit"] - losses["cut"] for losses in held.losses.values())


def rise_with(held: Refit) -> float:
    """Of the held-out loss, in nats: what a cut with this refit has over the full model."""
    return fmean(losses["refit"] - losses["full"] for losses in held.losses.values())


def heals(session: Session) -> bool:
    """Whether an export heals its cut. Experts are not, and a large model only where that is asked for."""
    is_possible = session.settings.heal is not None and not session.architecture.expert_size
    return is_possible and not _is_left_alone(session)


def _is_left_alone(session: Session) -> bool:
    """Whether the model is too large to be healed without being asked for."""
    return session.settings.request.heal is None and session.full.num_params > HEALED_UP_TO


def healed(session: Session, plan: SubnetPlan) -> tuple[Session, SubnetPlan]:
    """The plan with the name of what healing made of its refit, and a session that has it.

    Both are unchanged where the request heals nothing, or does not ask for it and the model is large.
    """
    settings = session.settings.heal
    if settings is None:
        return session, plan
    if _is_left_alone(session):
        billions = session.full.num_params / 1e9
        session.progress.note(
            f"The cut is not healed, because the model has {billions:.1f} billion parameters. To heal it: --heal 20m."
        )
        return session, plan
    draw = session.draw(HEAL_RECIPE)
    facts = _facts(session, plan, draw, kind="heal") | {
        "start": plan.refit_id,
        "settings": dataclasses.asdict(settings),
    }
    held = _cached(session, facts)
    if held is None:
        kept: list[Refit] = []
        heal(
            session.supernet,
            plan,
            materialize_subnet(session.supernet, plan).specs,
            draw,
            settings,
            take=lambda made: kept.append(_put(session, made, facts)),
            host=session.host,
        )
        (held,) = kept
    session.progress.note(_told(plan, held))
    return _with(session, held), dataclasses.replace(plan, refit_id=held.identity)


def with_named_refit(session: Session, plan: SubnetPlan) -> tuple[Session, SubnetPlan]:
    """A session that has the refit that a given plan names; with `--refit off`, the plan without it.

    It is the file that `--refit` names, or that of the cache with the same content, or made again and compared. A plan
    that names none gets the file's.

    Raises:
        RefitDiffers: The file is another one, or what was made again has other bits, as on another processor.
    """
    settings = session.settings
    if plan.refit_id is None and settings.refit_file:
        given = read_refit(settings.refit_file)
        return _with(session, given), dataclasses.replace(plan, refit_id=given.identity)
    if plan.refit_id is None:
        return session, plan
    bare = dataclasses.replace(plan, refit_id=None)
    if settings.refit == OFF:
        return session, bare
    held = (
        read_refit(settings.refit_file)
        if settings.refit_file
        else find_refit(session.cache, plan.refit_id, progress=session.progress)
    )
    if held is None:
        made, (named,) = refitted(session, [bare], settings.refit)
        if named.refit_id != plan.refit_id:
            other, again = healed(*refitted_unless_worse(session, bare, settings.refit))
            made, named = (made, named) if again.refit_id is None else (other, again)
        assert named.refit_id is not None
        held = made.supernet.refits[named.refit_id]
    if held.identity != plan.refit_id:
        raise RefitDiffers(plan.refit_id, held.identity, was_given=settings.refit_file is not None)
    return _with(session, held), plan


def find_refit(cache: Cache, identity: str, *, progress: Progress = SILENT) -> Refit | None:
    """The refit with this content, if the cache has it."""
    folder = cache.get(REFITS, {"sha256": identity}, progress=progress)
    return None if folder is None else read_refit(folder / REFIT_NAME)


def holding_refit(
    supernet: Supernet, plan: SubnetPlan, file: Path | None, cache: Cache, *, progress: Progress = SILENT
) -> Supernet:
    """`supernet` with the refit that `plan` names: from the file, or by its content from the cache.

    Raises:
        NotFound: Neither has it.
        RefitDiffers: The file is another one.
    """
    if plan.refit_id is None:
        return supernet
    held = read_refit(file) if file else find_refit(cache, plan.refit_id, progress=progress)
    if held is None:
        raise NotFound(
            "The refit that the artifact was made with",
            f"sha256 {plan.refit_id}",
            next_step="Say where it is with --refit; the cache does not have it.",
        )
    if held.identity != plan.refit_id:
        raise RefitDiffers(plan.refit_id, held.identity, was_given=True)
    return dataclasses.replace(supernet, refits={**supernet.refits, held.identity: held})


def _told(plan: SubnetPlan, held: Refit) -> str:
    """What a refit did, in one line."""
    texts = "; ".join(
        f"on '{text}' {losses['cut']:.3f} to {losses['refit']:.3f} (full model {losses['full']:.3f})"
        for text, losses in held.losses.items()
    )
    return f"{'Healed' if held.kind == 'heal' else 'Refitted'} {plan.shape}: loss {texts}."


def _facts(session: Session, plan: SubnetPlan, draw: Draw, *, kind: str) -> dict[str, Any]:
    """What a recovery is looked up by."""
    strategy = session.supernet.strategy
    return {
        "kind": kind,
        "model": session.supernet.identity,
        "adapters": list(adapter_ids(session.supernet)),
        "strategy": strategy.identity if strategy else None,
        "plan": plan.geometry,
        **draw.facts,
    }


def _cached(session: Session, facts: Mapping[str, Any]) -> Refit | None:
    known = session.cache.get_json(RECOVERIES, facts, ID_NAME, progress=session.progress)
    return None if known is None else find_refit(session.cache, str(known["sha256"]))


def _put(session: Session, made: Refitted, facts: Mapping[str, Any]) -> Refit:
    """Keep what was made by its content, and its name by what it was made from."""
    with tempfile.TemporaryDirectory(prefix="amoeba-refit-") as scratch:
        path = Path(scratch) / REFIT_NAME
        held = write_refit(path, made.facts, made.specs, made.weights(), dtype=_dtype(session))

        def move(folder: Path) -> None:
            shutil.copyfile(path, folder / REFIT_NAME)

        entry = session.cache.put(REFITS, {"sha256": held.identity}, move)
    session.cache.put_json(RECOVERIES, facts, ID_NAME, {"sha256": held.identity}, again=True)
    return read_refit(entry / REFIT_NAME)


def _dtype(session: Session) -> torch.dtype:
    """What fitted weights are kept in: the type of the source."""
    return session.supernet.dtype


def _with(session: Session, held: Refit) -> Session:
    """`session` whose supernet has a refit, once, as one more input."""
    supernet = session.supernet
    if held.identity in supernet.refits:
        return session
    entry = InputId(role="refit", id=f"{held.kind}, recipe {held.settings.get('recipe')}", sha256=held.identity)
    inputs = (*(item for item in supernet.inputs if item.role != "refit"), entry)
    refits = {**supernet.refits, held.identity: held}
    return session.with_supernet(dataclasses.replace(supernet, refits=refits, inputs=inputs))
