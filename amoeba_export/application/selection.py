"""What decides which weights stay: a strategy (given, cached, or calibrated now), its figures, and a given plan."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from amoeba_export.application.loadable import check_loadable, with_limits
from amoeba_export.application.recipes import deepened
from amoeba_export.application.request import ResolvedRequest
from amoeba_export.application.session import Session
from amoeba_export.artifact import sha256_file
from amoeba_export.cache.kinds import STRATEGIES
from amoeba_export.calibrate import Recipe, calibrate
from amoeba_export.evaluate.quality import QUALITY_NAME, read_quality
from amoeba_export.ir import InputId, Progress, Strategy, SubnetPlan, Supernet, validate
from amoeba_export.ir.belongs import check_plan_origin
from amoeba_export.ir.derive import derive_plan
from amoeba_export.load import read_strategy, write_strategy

STRATEGY_NAME = "strategy.safetensors"


def with_strategy(session: Session) -> Session:
    """`session` with a strategy: the one given, or one calibrated with the request's recipe, now or earlier.

    A request that needs none (everything is kept, or a plan without compensation) gets none. The strategy knows what
    each shape is worth without adapters; where the last adapter's folder has the `quality.json` that
    `amoeba evaluate --grid` writes, its figures take their place, as they are of the fine-tuned model.

    Raises:
        DamagedFile: `quality.json` is not such a file.
    """
    supernet = session.supernet
    if supernet.strategy is None and _needs_strategy(supernet, session.settings):
        assert session.settings.recipe is not None, "no strategy was given"
        supernet = _calibrated(session, session.settings.recipe)
    supernet = _with_quality(supernet, session.settings, progress=session.progress)
    return session.with_supernet(with_limits(session, supernet))


def deeper(session: Session) -> Session | None:
    """`session` with an automatic strategy that knows smaller subnets; None where there is none to be had."""
    recipe = session.settings.recipe
    if recipe is None or (deep := deepened(recipe, session.architecture.num_layers)) == recipe:
        return None
    supernet = _calibrated(session, deep)
    supernet = _with_quality(supernet, session.settings, progress=session.progress)
    return session.with_supernet(with_limits(session, supernet))


def _calibrated(session: Session, recipe: Recipe) -> Supernet:
    supernet, cache, progress = session.supernet, session.cache, session.progress
    request = session.settings.request
    facts = {"model": supernet.identity, "recipe": recipe.identity, "seed": request.seed}
    folder = cache.get(STRATEGIES, facts, progress=progress)
    if folder is None:
        progress.note(f"No --strategy was given: calibrating with the recipe '{recipe.name}', seed {request.seed}.")
        made = calibrate(supernet, recipe, seed=request.seed, cache_dir=cache.root, progress=progress)
        folder = cache.put(STRATEGIES, facts, lambda place: _write(made, place))
    else:
        progress.note(f"No --strategy was given: taking the cached one of recipe '{recipe.name}', seed {request.seed}.")
    strategy = read_strategy(folder / STRATEGY_NAME)
    entry = InputId(role="strategy", id=f"recipe {recipe.name}, seed {request.seed}", sha256=strategy.identity or "")
    return dataclasses.replace(supernet, strategy=strategy, inputs=(*supernet.inputs, entry))


def _with_quality(supernet: Supernet, settings: ResolvedRequest, *, progress: Progress) -> Supernet:
    """Figures of the fine-tuned model instead of the strategy's.

    Those of other inputs are left aside, with a warning: the file is found and not given, so an old one must not stop
    an export.
    """
    adapters, strategy = settings.request.adapters, supernet.strategy
    path = adapters[-1] / QUALITY_NAME if adapters else None
    if strategy is None or path is None or not path.is_file():
        return supernet
    file = read_quality(path)
    differences = file.differences(supernet.inputs)
    if file.subject.get("policy") == "adaptive" != settings.policy:
        differences.append("its shapes are adaptive, and uniform ones are asked for")
    values = file.values
    if not values and not differences:
        differences.append("it has no shape yet")
    if differences:
        progress.warn(
            f"{path} is not used: {'; '.join(differences)}. What a shape is worth comes from the strategy, without the "
            "adapter. Measure again with 'amoeba evaluate --grid'."
        )
        return supernet
    progress.note(
        f"What a shape is worth comes from {path}: {file.metric} of {len(values)} shapes with the adapter, "
        f"{max(values)} to {min(values)}."
    )
    strategy = dataclasses.replace(
        strategy, quality=values, quality_metric=file.metric, policy=str(file.subject["policy"])
    )
    entry = InputId(role="quality", id=QUALITY_NAME, sha256=sha256_file(path))
    return dataclasses.replace(supernet, strategy=strategy, inputs=(*supernet.inputs, entry))


def given_plan(session: Session) -> SubnetPlan:
    """The plan that `--plan` or `--shape` names, checked against the supernet.

    Raises:
        WrongModel: The plan was made for another model, or with another strategy than the one at hand.
        InputError: The plan breaks a rule.
        UsageError: The strategy does not know the shape.
        OutsideLimits: The target's runtime does not load it.
    """
    supernet, settings = session.supernet, session.settings
    if settings.plan is not None:
        check_plan_origin(settings.plan, supernet)
        validate(settings.plan, supernet.architecture)
        return check_loadable(session, dataclasses.replace(settings.plan, head_tokens=supernet.head_tokens))
    assert settings.shape, "a search chooses"
    if supernet.strategy is None:
        return check_loadable(session, supernet.full_plan())
    plan = derive_plan(
        supernet.strategy,
        supernet.architecture,
        settings.shape,
        settings.rules(supernet, settings.dtypes[0] if settings.dtypes else None),
    )
    return check_loadable(session, dataclasses.replace(plan, head_tokens=supernet.head_tokens))


def _needs_strategy(supernet: Supernet, settings: ResolvedRequest) -> bool:
    architecture = supernet.architecture
    if settings.plan is not None:
        return settings.plan.is_compensated(architecture)
    shape = settings.shape
    return shape is None or (shape.depth, shape.width) != (architecture.num_layers, 1.0)


def _write(strategy: Strategy, folder: Path) -> None:
    write_strategy(strategy, folder / STRATEGY_NAME)
