"""`amoeba finetune`: Stage 2.

Commands are long on purpose: each parameter is a flag, with its help.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from amoeba_export.cli.artifacts import command
from amoeba_export.cli.console import Talk, answer, facts, print_json, titled
from amoeba_export.cli.options import AsJson, Model, model_or_default
from amoeba_export.cli.training_options import RUN, SHAPES, with_settings
from amoeba_export.finetune.settings import Settings


@with_settings
def finetune(
    strategy: Annotated[
        Path, typer.Option("--strategy", metavar="F", help="The strategy, a file that 'amoeba calibrate' wrote.")
    ],
    data: Annotated[
        Path,
        typer.Option(
            "--data", metavar="F", help="Training data: JSONL with instructions, chats or texts, or plain text."
        ),
    ],
    out: Annotated[
        Path, typer.Option("--out", metavar="DIR", help="The adapter folder. It appears at the end of the run.")
    ],
    model: Model = None,
    *,
    settings: Settings,
    shape: Annotated[
        str | None,
        typer.Option("--shape", metavar="DEPTHxWIDTH", help="Train only this shape.", rich_help_panel=SHAPES),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue an unfinished run.", rich_help_panel=RUN)] = False,
    force: Annotated[
        bool, typer.Option("--force", help="Replace an existing adapter folder.", rich_help_panel=RUN)
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Train one adapter for all shapes in one run (stage 2).

    To continue a stopped run, repeat the command with `--resume`.

    For several devices, run `accelerate launch $(command -v amoeba) finetune ...`, or torchrun in its place.
    """
    from amoeba_export.application.finetune import finetune as run

    name = model_or_default(model)
    done = run(
        name,
        strategy=strategy,
        data=data,
        out=out,
        settings=settings,
        shape=shape,
        resume=resume,
        force=force,
        progress=Talk(),
    )
    if int(os.environ.get("RANK", "0")):  # one of several processes: the first one answers
        return
    losses = {str(shape): loss for shape, loss in done.losses.items()}
    if as_json:
        print_json({"out": str(done.folder), "steps": done.steps, "tokens": done.tokens, "losses": losses})
        return
    rows = {"steps": str(done.steps), "tokens": f"{done.tokens:,}"}
    rows |= {f"loss of {shape}": f"{loss:.4f}" for shape, loss in losses.items()}
    console = answer()
    console.print(titled(str(done.folder), facts(rows)))
    console.print()
    what = ("--shape", shape) if shape else ("--target", "cpu", "--latency", "75%")
    following = ("amoeba", "export", name, "--strategy", strategy, "--adapter", out, *what)
    console.print(f"next: {command(*following)}")
