"""Stage 1 as one call: open the model, find out what matters in it, write the strategy."""

from __future__ import annotations

import contextlib
import functools
from pathlib import Path

from amoeba_export.artifact import check_file_destination
from amoeba_export.cache import Cache
from amoeba_export.calibrate import calibrate as run
from amoeba_export.calibrate import load_recipe
from amoeba_export.errors import UnknownName
from amoeba_export.ir import SILENT, Progress, Strategy
from amoeba_export.load import load_supernet, write_strategy

ENGINES = ("local", "ray")


def calibrate(
    model: str = "demo",
    *,
    out: Path,
    recipe: str = "default",
    seed: int = 0,
    engine: str = "local",
    ray_address: str | None = None,
    progress: Progress = SILENT,
) -> Strategy:
    """Find out which layers, heads and neurons of `model` matter, and write that to `out`.

    Finished work is kept in the cache: a run that was stopped goes on where it was when it is asked for again.

    Args:
        model: A model folder, a hub id, or `demo`.
        out: The file, such as `strategy.safetensors`. Replaced when it exists.
        recipe: The name of a shipped recipe, or a TOML file.
        seed: Of the draw of samples.
        engine: Who scores candidates: `local` is this process, `ray` the workers of a Ray cluster.
        ray_address: `HOST:PORT` of the cluster; None for RAY_ADDRESS, else this machine.
        progress: Told of everything that takes time.

    Returns:
        The strategy, with the identity of the file.

    Raises:
        UsageError: No such engine, `out` is a folder, or the recipe asks for what the model does not have.
        InputError: The model, the recipe or its data cannot be used.
        TargetError: The cluster cannot be used.
    """
    if engine not in ENGINES:
        raise UnknownName("engine", engine, ENGINES)
    check_file_destination(out)
    settings = load_recipe(recipe)
    supernet = load_supernet(model, progress=progress)
    with contextlib.ExitStack() as stack:
        fleet = None
        if engine == "ray":
            from amoeba_export.calibrate.fleet import RayFleet

            place = str(Path(model).resolve()) if Path(model).exists() else model
            fleet = stack.enter_context(RayFleet(functools.partial(load_supernet, place), address=ray_address))
        made = run(supernet, settings, seed=seed, cache_dir=Cache().root, fleet=fleet, progress=progress)
    return write_strategy(made, out)
