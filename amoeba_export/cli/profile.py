"""`amoeba profile`: record what a target costs once, and replay it where the target is not."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from amoeba_export.artifact import check_file_destination
from amoeba_export.cache import Cache
from amoeba_export.cli.artifacts import command
from amoeba_export.cli.console import Talk, answer, print_json
from amoeba_export.cli.inspect import inspect_cost_table
from amoeba_export.cli.options import AsJson, Batch, Dtype, Generate, Model, Prompt, Target, model_or_default
from amoeba_export.errors import EstimateRefused


def profile(
    target: Target,
    out: Annotated[Path, typer.Option("--out", metavar="F", help="Where to write the cost table (JSON).")],
    model: Model = None,
    dtype: Dtype = None,
    prompt: Prompt = 128,
    generate: Generate = 128,
    batch: Batch = 1,
    host: Annotated[
        str | None, typer.Option("--host", metavar="USER@HOST", help="Measure on this machine, through SSH.")
    ] = None,
    port: Annotated[int | None, typer.Option("--port", metavar="N", help="SSH port of --host.")] = None,
    identity: Annotated[
        Path | None, typer.Option("--identity", metavar="F", help="SSH private key for --host.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Record a cost table of a target, to replay where it is not.

    Graphs that span the space of subnets are measured, and an additive model is fitted to them.

    The graphs have the model's dims and random weights: no checkpoint travels, and speed does not depend on values.
    """
    from amoeba_export.application.costs import Profiling, is_measured, make_cost_table
    from amoeba_export.backends.targets import over_ssh, read_target
    from amoeba_export.ir import Workload
    from amoeba_export.load import load_supernet
    from amoeba_export.profile import write_table

    check_file_destination(out)
    found = read_target(target)
    if host is not None:
        found = over_ssh(found, host, port=port, identity=identity)
    if not is_measured(found):
        raise EstimateRefused(found.name, found.backend)
    talk = Talk()
    name = model_or_default(model)
    supernet = load_supernet(name, progress=talk)
    workload = Workload(prompt_tokens=prompt, generate_tokens=generate, batch=batch)
    profiling = Profiling(supernet=supernet, target=found, workload=workload, dtype=dtype or found.dtype)
    costs = make_cost_table(profiling, cache=Cache(), refresh=True, progress=talk)
    out.parent.mkdir(parents=True, exist_ok=True)
    write_table(costs, out)
    data, shown = inspect_cost_table(out)
    if as_json:
        print_json({"out": str(out), **data})
        return
    console = answer()
    for renderable in shown:
        console.print(renderable)
    console.print()
    console.print(f"next: {command('amoeba', 'inspect', out)}")
