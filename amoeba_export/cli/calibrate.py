"""`amoeba calibrate`: Stage 1."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from amoeba_export.artifact import Cache, check_file_destination
from amoeba_export.cli.artifacts import command
from amoeba_export.cli.completion import complete_recipes
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
            help="A shipped recipe, or a TOML file of yours.",
            autocompletion=complete_recipes,
        ),
    ] = "default",
    seed: Annotated[int, typer.Option("--seed", help="Of the draw of samples.")] = 0,
    as_json: AsJson = False,
) -> None:
    """Find out which layers, heads and neurons matter (Stage 1).

    A run that was stopped goes on where it was when the same command is given again.
    """
    from amoeba_export.calibrate import calibrate as run
    from amoeba_export.calibrate import load_recipe
    from amoeba_export.load import load_supernet, write_strategy

    check_file_destination(out)
    settings = load_recipe(recipe)
    talk = Talk()
    name = model_or_default(model)
    supernet = load_supernet(name, progress=talk)
    made = run(supernet, settings, seed=seed, cache_dir=Cache().root, progress=talk)
    strategy = write_strategy(made, out)
    if as_json:
        print_json({"out": str(out), **strategy_to_json(strategy)})
        return
    console = answer()
    console.print(titled(str(out), facts(strategy_facts(strategy))))
    console.print()
    following = ("amoeba", "export", name, "--strategy", out, "--target", "cpu", "--latency", "75%")
    console.print(f"next: {command(*following)}")
