"""`amoeba import`: a strategy of the published code becomes one of ours, once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from amoeba_export.artifact import check_file_destination
from amoeba_export.cli.console import Talk, answer, facts, print_json, titled
from amoeba_export.cli.options import AsJson
from amoeba_export.cli.strategies import strategy_facts, strategy_to_json


def import_strategy(
    file: Annotated[Path, typer.Argument(metavar="UPSTREAM.npy", help="The file dp_selection_strategy.npy.")],
    model: Annotated[str, typer.Argument(metavar="MODEL", help="The model that it was made for.")],
    out: Annotated[Path, typer.Option("--out", metavar="F", help="Where to write strategy.safetensors.")],
    as_json: AsJson = False,
) -> None:
    """Convert a strategy of the published AmoebaLLM code.

    Runs no code from the pickle in the file.
    """
    from amoeba_export.load import load_supernet, write_strategy
    from amoeba_export.load.upstream import import_upstream

    check_file_destination(out)
    supernet = load_supernet(model, progress=Talk())
    strategy = write_strategy(import_upstream(file, supernet.architecture), out)
    if as_json:
        print_json({"out": str(out), **strategy_to_json(strategy)})
    else:
        answer().print(titled(str(out), facts(strategy_facts(strategy))))
