"""`amoeba export` and `amoeba search`: the main job, and its first half.

Commands are long on purpose: each parameter is a flag, with its help.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from amoeba_export.cli.artifacts import command, files_table, result_table
from amoeba_export.cli.choices import checked_plots, is_whole, looked_at, show_choice, write_plots
from amoeba_export.cli.console import Talk, answer, print_json
from amoeba_export.cli.options import (
    Adapters,
    AsJson,
    Batch,
    CalibrationData,
    Formats,
    Generate,
    HealFor,
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
    RoundingName,
    SearchedDtype,
    Seed,
    StrategyFile,
    TargetName,
    Throughput,
    VocabKeep,
    model_or_default,
    split_commas,
)
from amoeba_export.errors import UsageError


def export(
    model: Model = None,
    target: TargetName = None,
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
    heal: HealFor = None,
    calibration_data: CalibrationData = None,
    rounding: RoundingName = None,
    vocab_keep: VocabKeep = None,
    adapter: Adapters = None,
    shape: Annotated[
        str | None,
        typer.Option(
            "--shape",
            metavar="DEPTHxWIDTH",
            help="Export this shape, such as 24x0.75. No search.",
            rich_help_panel="Subnet",
        ),
    ] = None,
    plan: Annotated[
        Path | None,
        typer.Option(
            "--plan",
            metavar="F",
            help="Export this plan, from an earlier artifact. No search.",
            rich_help_panel="Subnet",
        ),
    ] = None,
    pick: Annotated[
        int | None,
        typer.Option(
            "--pick",
            metavar="N",
            help="Export choice N of 'amoeba frontier' with the same options. No search.",
            rich_help_panel="Subnet",
        ),
    ] = None,
    policy: PolicyName = "uniform",
    formats: Formats = None,
    dtype: SearchedDtype = None,
    require_measured: Annotated[
        bool,
        typer.Option(
            "--require-measured", help="Refuse a target whose latency is only estimated.", rich_help_panel="Latency"
        ),
    ] = False,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            metavar="DIR",
            help="Folder of the artifact. Default: dist/MODEL-TARGET-LATENCY.",
            rich_help_panel="Output",
        ),
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Replace an existing artifact at --out.", rich_help_panel="Output")
    ] = False,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Search and show the choice. Writes nothing.", rich_help_panel="Output"),
    ] = (False),
    plot: PlotFiles = None,
    as_json: AsJson = False,
) -> None:
    """Cut a model to a latency budget; write, verify and measure it.

    Amoeba opens the artifact again from disk, compares it with the masked supernet and measures it on the target. A
    run that fails leaves nothing at --out.
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
        heal=heal,
        calibration_data=tuple(calibration_data or ()),
        rounding=rounding,
        vocab_keep=vocab_keep,
        adapters=tuple(adapter or ()),
        shape=shape,
        plan=plan,
        pick=pick,
        policy=policy,
        formats=split_commas(formats),
        dtype=dtype,
        require_measured=require_measured,
        out=out,
        force=force,
        dry_run=dry_run,
    )
    files = checked_plots(plot)
    if files and (shape or plan):
        raise UsageError(
            "There is nothing to plot: the shape is given.",
            next_step="'amoeba frontier --plot' draws what there is to choose from.",
        )
    result = pipeline.export(request, progress=Talk())
    write_plots([result.frontier] if result.frontier else [], files)
    if result.manifest is None:
        show_choice(result, as_json=as_json)
        return
    out = result.settings.out
    if as_json:
        print_json({"out": str(out), **result.manifest.to_json(), **looked_at(result)})
        return
    console = answer()
    console.print()
    if result.search is not None and is_whole(result):
        console.print(
            f"The whole model in {result.manifest.dtype} keeps the budget, and no subnet is better: none is cut."
        )
        console.print()
    console.print(result_table(result.manifest, full=result.fitted.full if result.fitted else None))
    console.print()
    console.print(files_table(result.manifest.files, out))
    console.print()
    console.print(f"next: {command('amoeba', 'bench', out)}")


def search(
    model: Model = None,
    target: TargetName = None,
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
    plot: PlotFiles = None,
    as_json: AsJson = False,
) -> None:
    """Find the best shapes within a budget. Writes nothing.

    With --json, the output has the plan of the choice, for export --plan.
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
    result = pipeline.search(request, progress=Talk())
    write_plots([result.frontier] if result.frontier else [], files)
    show_choice(result, as_json=as_json)
