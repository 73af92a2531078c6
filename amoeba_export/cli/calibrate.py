"""`amoeba calibrate`: Stage 1."""

from __future__ import annotations

import contextlib
import functools
from pathlib import Path
from typing import Annotated

import typer

from amoeba_export.artifact import check_file_destination
from amoeba_export.cache import Cache
from amoeba_export.cli.artifacts import command
from amoeba_export.cli.completion import complete_from, complete_recipes
from amoeba_export.cli.console import Talk, answer, facts, print_json, titled
from amoeba_export.cli.options import AsJson, Model, model_or_default
from amoeba_export.cli.strategies import strategy_facts, strategy_to_json
from amoeba_export.errors import UnknownName


def calibrate(
    out: Annotated[Path, typer.Option("--out", metavar="F", help="Where to write strategy.safetensors.")],
    model: Model = None,
    recipe: Annotated[
        str,
        typer.Option(
            "--recipe",
            metavar="quick|default|F",
            help="A shipped recipe, or a TOML file of yours.",
            autocompletion=complete_recipes,
        ),
    ] = "default",
    seed: Annotated[int, typer.Option("--seed", help="Of the draw of samples.")] = 0,
    engine: Annotated[
        str,
        typer.Option(
            "--engine",
            metavar="local|ray",
            help="Who scores candidates: this process, or the workers of a Ray cluster.",
            autocompletion=complete_from(("local", "ray")),
        ),
    ] = "local",
    ray_address: Annotated[
        str | None,
        typer.Option("--ray-address", metavar="HOST:PORT", help="The cluster; else RAY_ADDRESS, else this machine."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Find out which layers, heads and neurons matter (Stage 1).

    A run that was stopped goes on where it was when the same command is given again.
    """
    from amoeba_export.calibrate import calibrate as run
    from amoeba_export.calibrate import load_recipe
    from amoeba_export.load import load_supernet, write_strategy

    if engine not in ("local", "ray"):
        raise UnknownName("engine", engine, ("local", "ray"))
    check_file_destination(out)
    settings = load_recipe(recipe)
    talk = Talk()
    name = model_or_default(model)
    supernet = load_supernet(name, progress=talk)
    with contextlib.ExitStack() as stack:
        fleet = None
        if engine == "ray":
            from amoeba_export.calibrate.fleet import RayFleet

            opened_there = functools.partial(load_supernet, str(Path(name).resolve()) if Path(name).exists() else name)
            fleet = stack.enter_context(RayFleet(opened_there, address=ray_address))
        made = run(supernet, settings, seed=seed, cache_dir=Cache().root, fleet=fleet, progress=talk)
    strategy = write_strategy(made, out)
    if as_json:
        print_json({"out": str(out), **strategy_to_json(strategy)})
        return
    console = answer()
    console.print(titled(str(out), facts(strategy_facts(strategy))))
    console.print()
    following = ("amoeba", "export", name, "--strategy", out, "--target", "cpu", "--latency", "75%")
    console.print(f"next: {command(*following)}")
