"""`amoeba frontier`: latency against quality of every shape and precision on a target.

Commands are long on purpose: each parameter is a flag, with its help.
"""

from __future__ import annotations

from typing import Annotated

import typer

from amoeba_export.cli.artifacts import command, words_given
from amoeba_export.cli.choices import checked_plots, frontier_table, write_plots
from amoeba_export.cli.console import Talk, answer, print_json, titled
from amoeba_export.cli.options import (
    Adapters,
    AsJson,
    Batch,
    CalibrationData,
    Formats,
    Generate,
    Latency,
    Memory,
    MetricName,
    Model,
    Percentile,
    PlotFiles,
    PolicyName,
    Prompt,
    Quality,
    QualityLoss,
    RecipeName,
    RefitName,
    SearchedDtype,
    Seed,
    StrategyFile,
    Target,
    Throughput,
    model_or_default,
    split_commas,
)

NOT_OF_A_NUMBER = ("latency", "throughput", "quality", "quality_loss", "measure", "plot", "as_json")
"""Lines in the picture and ways to show it: the numbers do not depend on them, and a choice need not keep a limit."""


def frontier(
    context: typer.Context,
    target: Target,
    model: Model = None,
    latency: Latency = None,
    throughput: Throughput = None,
    memory: Memory = None,
    quality: Quality = None,
    quality_loss: QualityLoss = None,
    metric: MetricName = None,
    percentile: Percentile = 50,
    prompt: Prompt = 128,
    generate: Generate = 128,
    batch: Batch = 1,
    strategy: StrategyFile = None,
    recipe: RecipeName = "quick",
    seed: Seed = 0,
    refit: RefitName = None,
    calibration_data: CalibrationData = None,
    adapter: Adapters = None,
    policy: PolicyName = "uniform",
    formats: Formats = None,
    dtype: SearchedDtype = None,
    measure: Annotated[
        int,
        typer.Option("--measure", metavar="N", min=0, help="Number of subnets to measure, spread over the frontier."),
    ] = 0,
    plot: PlotFiles = None,
    as_json: AsJson = False,
) -> None:
    """Show latency against quality of all choices on a target.

    These are every shape in every precision, and the full model in each. A budget is a line in the picture.

    The best choices are numbered. export --pick takes a number, with the same options.
    """
    from amoeba_export.application import pipeline
    from amoeba_export.application.request import ExportRequest

    request = ExportRequest(
        model=model_or_default(model),
        target=target,
        latency=latency,
        throughput=throughput,
        memory=memory,
        quality=quality,
        quality_loss=quality_loss,
        metric=metric,
        percentile=percentile,
        prompt_tokens=prompt,
        generate_tokens=generate,
        batch=batch,
        strategy=strategy,
        recipe=recipe,
        seed=seed,
        refit=refit,
        calibration_data=tuple(calibration_data or ()),
        adapters=tuple(adapter or ()),
        policy=policy,
        formats=split_commas(formats),
        dtype=dtype,
    )
    files = checked_plots(plot)
    found = pipeline.frontier(request, measure=measure, progress=Talk())
    write_plots([found], files)
    if as_json:
        print_json(found.to_json())
        return
    console = answer()
    console.print(titled(f"{found.model} on {found.target}", frontier_table(found, numbers=True)))
    if found.numbered:
        call = command("amoeba", "export", *words_given(context, but=NOT_OF_A_NUMBER), "--pick", "N")
        console.print()
        console.print(f"next: {call}")
