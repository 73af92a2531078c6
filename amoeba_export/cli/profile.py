"""`amoeba profile`: record what a target costs once, and replay it where the target is not.

Commands are long on purpose: each parameter is a flag, with its help.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from amoeba_export.cli.artifacts import command
from amoeba_export.cli.console import Talk, answer, print_json
from amoeba_export.cli.inspect import inspect_cost_table
from amoeba_export.cli.options import AsJson, Batch, Dtype, Generate, Model, Prompt, Target, model_or_default
from amoeba_export.errors import BadValue
from amoeba_export.ir import Workload


def profile(
    target: Target,
    out: Annotated[Path, typer.Option("--out", metavar="F", help="Where to write the cost table (JSON).")],
    model: Model = None,
    dtype: Dtype = None,
    prompt: Prompt = 128,
    generate: Generate = 128,
    batch: Batch = 1,
    threads: Annotated[
        str | None,
        typer.Option(
            "--threads",
            metavar="N|sweep",
            help="Number of CPU threads; 'sweep' tries several and takes the fewest within 2 % of the fastest.",
        ),
    ] = None,
    host: Annotated[
        str | None, typer.Option("--host", metavar="USER@HOST", help="Measure on this host, over SSH.")
    ] = None,
    port: Annotated[int | None, typer.Option("--port", metavar="N", help="SSH port of --host.")] = None,
    identity: Annotated[
        Path | None, typer.Option("--identity", metavar="F", help="SSH private key for --host.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Measure a cost table on a target, for searches without it.

    Amoeba measures graphs that span the space of subnets, and fits an additive model to them.

    The graphs have the model's dims and random weights: speed does not depend on values, and no checkpoint is sent.
    """
    from amoeba_export.application.profile import profile as run
    from amoeba_export.backends.targets import over_ssh, read_target

    found = read_target(target)
    if host is not None:
        found = over_ssh(found, host, port=port, identity=identity)
    workload = Workload(prompt_tokens=prompt, generate_tokens=generate, batch=batch)
    model, asked = model_or_default(model), _threads(threads)
    run(found, model, out=out, dtype=dtype, workload=workload, threads=asked, progress=Talk())
    data, shown = inspect_cost_table(out)
    if as_json:
        print_json({"out": str(out), **data})
        return
    console = answer()
    for renderable in shown:
        console.print(renderable)
    console.print()
    console.print(f"next: {command('amoeba', 'inspect', out)}")


def _threads(text: str | None) -> int | Literal["sweep"] | None:
    if text is None:
        return None
    if text == "sweep":
        return "sweep"
    if not text.isdecimal() or not int(text):
        raise BadValue("--threads", text, "a number of threads, or sweep")
    return int(text)
