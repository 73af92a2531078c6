"""`amoeba refit` and `amoeba heal`: fitted weights of a plan, as a file.

Commands are long on purpose: each parameter is a flag, with its help.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from amoeba_export.cli.artifacts import command, words_given
from amoeba_export.cli.console import Talk, answer, facts, print_json, table, titled
from amoeba_export.cli.options import (
    Adapters,
    AsJson,
    CalibrationData,
    Model,
    RecipeName,
    Seed,
    StrategyFile,
    model_or_default,
)

if TYPE_CHECKING:
    from amoeba_export.ir import Refit

PlanFile = Annotated[
    Path, typer.Option("--plan", metavar="F", help="The plan.json of an artifact, or the output of 'search --json'.")
]
WeightsFile = Annotated[Path, typer.Option("--out", metavar="F", help="Where to write refit.safetensors.")]

OF_THE_FIT = ("out", "refit", "duration", "as_json")
"""Parameters that an export of its result does not need again."""


def refit(
    context: typer.Context,
    plan: PlanFile,
    out: WeightsFile,
    model: Model = None,
    refit: Annotated[
        str, typer.Option("--refit", metavar="fast|full", help="Recipe of the fit; full uses more tokens.")
    ] = "full",
    calibration_data: CalibrationData = None,
    strategy: StrategyFile = None,
    recipe: RecipeName = "quick",
    adapter: Adapters = None,
    seed: Seed = 0,
    as_json: AsJson = False,
) -> None:
    """Fit the remaining weights of a cut to make up for the removed ones.

    To continue a stopped run, repeat the command.
    """
    from amoeba_export.application.refit import refit as run

    name = model_or_default(model)
    held = run(
        name,
        plan=plan,
        out=out,
        refit=refit,
        strategy=strategy,
        recipe=recipe,
        adapters=tuple(adapter or ()),
        calibration_data=tuple(calibration_data or ()),
        seed=seed,
        progress=Talk(),
    )
    _show(held, out, context, as_json=as_json)


def heal(
    context: typer.Context,
    plan: PlanFile,
    out: WeightsFile,
    duration: Annotated[
        str, typer.Option("--heal", metavar="20m|2Mtok", help="How long to train: a time, or a number of tokens.")
    ] = "20m",
    model: Model = None,
    refit: Annotated[
        str,
        typer.Option("--refit", metavar="fast|full|FILE", help="The refit to start from, if the plan names none."),
    ] = "full",
    calibration_data: CalibrationData = None,
    strategy: StrategyFile = None,
    recipe: RecipeName = "quick",
    adapter: Adapters = None,
    seed: Seed = 0,
    as_json: AsJson = False,
) -> None:
    """Train a cut after its refit, by distillation from the full model.

    To continue a stopped run, repeat the command.
    """
    from amoeba_export.application.refit import heal as run

    name = model_or_default(model)
    held = run(
        name,
        plan=plan,
        out=out,
        heal=duration,
        refit=refit,
        strategy=strategy,
        recipe=recipe,
        adapters=tuple(adapter or ()),
        calibration_data=tuple(calibration_data or ()),
        seed=seed,
        progress=Talk(),
    )
    _show(held, out, context, as_json=as_json)


def _show(held: Refit, out: Path, context: typer.Context, *, as_json: bool) -> None:
    if as_json:
        losses = {text: dict(values) for text, values in held.losses.items()}
        print_json({"out": str(out), "kind": held.kind, "sha256": held.identity, "losses": losses})
        return
    console = answer()
    console.print(titled(str(out), facts({"kind": held.kind, "sha256": held.identity})))
    console.print()
    shown = table("text", "full model", "before", "after", right=("full model", "before", "after"))
    for text, values in held.losses.items():
        shown.add_row(text, *(f"{values[name]:.4f}" for name in ("full", "cut", "refit")))
    console.print(titled("Held-out loss", shown))
    console.print()
    given = words_given(context, but=OF_THE_FIT)
    console.print(f"next: {command('amoeba', 'export', *given, '--refit', out)}")
