"""`amoeba calibrate`: Stage 1."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from amoeba_export.cli.artifacts import command
from amoeba_export.cli.completion import complete_from, complete_recipes
from amoeba_export.cli.console import Talk, answer, facts, print_json, titled
from amoeba_export.cli.options import AsJson, Model, model_or_default
from amoeba_export.cli.strategies import strategy_facts, strategy_to_json


def calibrate(
    out: Annotated[Path, typer.Option("--out", metavar="F", help="Where to write strategy.safetensors.")],
    model: Model = None,
    recipe: Annotated[
        str,
        typer.Option(
            "--recipe",
            metavar="quick|default|F",
            help="Name of a built-in recipe, or your own TOML file.",
            autocompletion=complete_recipes,
        ),
    ] = "default",
    seed: Annotated[int, typer.Option("--seed", help="Seed for drawing the samples.")] = 0,
    engine: Annotated[
        str,
        typer.Option(
            "--engine",
            metavar="local|ray",
            help="Where to score candidates: in this process, or in the workers of a Ray cluster.",
            autocompletion=complete_from(("local", "ray")),
        ),
    ] = "local",
    ray_address: Annotated[
        str | None,
        typer.Option(
            "--ray-address", metavar="HOST:PORT", help="The Ray cluster. Default: RAY_ADDRESS, else this machine."
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Rank layers, heads and neurons by importance (stage 1).

    To continue a stopped run, repeat the command.
    """
    from amoeba_export.application.calibrate import calibrate as run

    name = model_or_default(model)
    strategy = run(name, out=out, recipe=recipe, seed=seed, engine=engine, ray_address=ray_address, progress=Talk())
    if as_json:
        print_json({"out": str(out), **strategy_to_json(strategy)})
        return
    console = answer()
    console.print(titled(str(out), facts(strategy_facts(strategy))))
    console.print()
    following = ("amoeba", "export", name, "--strategy", out, "--target", "cpu", "--latency", "75%")
    console.print(f"next: {command(*following)}")
