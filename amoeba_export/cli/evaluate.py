"""`amoeba evaluate`: perplexity and tasks of a supernet at a shape, of all its shapes, or of an artifact.

Commands are long on purpose: each parameter is a flag, with its help.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from amoeba_export.cli.completion import complete_from
from amoeba_export.cli.console import Talk, answer, percent, print_json, table
from amoeba_export.cli.options import Adapters, AsJson, PolicyName, floats, integers, model_or_default, split_commas
from amoeba_export.ir.dtype import TRAINED_DTYPES

if TYPE_CHECKING:
    from amoeba_export.evaluate import QualityFile, ShapeQuality

_FORMATS = ("safetensors", "onnx")
_WHAT, _SUBNET, _OUTPUT = "What to measure", "Subnet", "Output"


def evaluate(
    model: Annotated[
        str | None,
        typer.Argument(
            metavar="MODEL|ARTIFACT",
            help="A supernet (folder, hub id or demo), or an artifact.",
            show_default=False,
        ),
    ] = None,
    text: Annotated[
        Path | None,
        typer.Option("--text", metavar="F", help="A text file to measure the perplexity on.", rich_help_panel=_WHAT),
    ] = None,
    window: Annotated[
        int, typer.Option("--window", metavar="N", help="Tokens per window.", rich_help_panel=_WHAT)
    ] = 512,
    windows: Annotated[
        int | None, typer.Option("--windows", metavar="N", help="Use only the first N windows.", rich_help_panel=_WHAT)
    ] = None,
    tasks: Annotated[
        str | None,
        typer.Option(
            "--tasks",
            metavar="T,T",
            help="Task files (.jsonl, .toml), or names of lm-eval tasks.",
            rich_help_panel=_WHAT,
        ),
    ] = None,
    task_folder: Annotated[
        Path | None,
        typer.Option(
            "--task-folder",
            metavar="DIR",
            help="Folder with your task files for lm-eval (YAML).",
            rich_help_panel=_WHAT,
        ),
    ] = None,
    limit: Annotated[
        int | None,
        typer.Option("--limit", metavar="N", help="Use only the first N items of a task.", rich_help_panel=_WHAT),
    ] = None,
    shape: Annotated[
        str | None,
        typer.Option(
            "--shape",
            metavar="DEPTHxWIDTH",
            help="The shape to measure. Default: the full model.",
            rich_help_panel=_SUBNET,
        ),
    ] = None,
    grid: Annotated[
        bool, typer.Option("--grid", help="Measure every shape of --depths and --widths.", rich_help_panel=_SUBNET)
    ] = False,
    depths: Annotated[
        str | None,
        typer.Option(
            "--depths", metavar="N,N", help="Depths of the grid. Default: all in the strategy.", rich_help_panel=_SUBNET
        ),
    ] = None,
    widths: Annotated[
        str | None,
        typer.Option(
            "--widths",
            metavar="X,X",
            help="Widths of the grid. Default: the adapter's, else 1 to 0.5.",
            rich_help_panel=_SUBNET,
        ),
    ] = None,
    strategy: Annotated[
        Path | None,
        typer.Option(
            "--strategy",
            metavar="F",
            help="The strategy, a file that 'amoeba calibrate' wrote.",
            rich_help_panel=_SUBNET,
        ),
    ] = None,
    adapter: Adapters = None,
    policy: PolicyName = "uniform",
    dtype: Annotated[
        str,
        typer.Option(
            "--dtype",
            metavar="|".join(TRAINED_DTYPES),
            help="Precision in which a supernet runs.",
            autocompletion=complete_from(TRAINED_DTYPES),
            rich_help_panel=_SUBNET,
        ),
    ] = TRAINED_DTYPES[0],
    container: Annotated[
        str | None,
        typer.Option(
            "--format",
            metavar="safetensors|onnx",
            help="The format of an artifact to measure. Default: its first.",
            autocompletion=complete_from(_FORMATS),
            rich_help_panel=_SUBNET,
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            metavar="F",
            help="The result file. Its shapes are not measured again. Default of --grid: the adapter's quality.json.",
            rich_help_panel=_OUTPUT,
        ),
    ] = None,
    plot: Annotated[
        Path | None, typer.Option("--plot", metavar="F", help="Draw quality against size.", rich_help_panel=_OUTPUT)
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Measure perplexity and multiple-choice accuracy.

    For a supernet, give the shape and the adapters. For an artifact, its own files run.
    """
    from amoeba_export.application.evaluate import evaluate as run
    from amoeba_export.application.subjects import EvaluateRequest, Grid
    from amoeba_export.pictures import check_picture

    request = EvaluateRequest(
        model=model_or_default(model),
        text=text,
        window=window,
        windows=windows,
        tasks=split_commas(tasks) or (),
        task_folder=task_folder,
        limit=limit,
        shape=shape,
        grid=Grid(integers("--depths", depths), floats("--widths", widths)) if grid else None,
        strategy=strategy,
        adapters=tuple(adapter or ()),
        policy=policy,
        dtype=dtype,
        container=container,
        out=out,
    )
    if plot:
        check_picture(plot)
    file = run(request, progress=Talk())
    if plot:
        _plot(file, plot)
    if as_json:
        print_json(file.to_json())
    else:
        _show(file)


def _plot(file: QualityFile, path: Path) -> None:
    from amoeba_export.evaluate import pareto
    from amoeba_export.pictures import SizedPoint, draw_sizes

    by_text = all(shape.perplexity is not None for shape in file.shapes)
    front = {shape.shape for shape in pareto(file.shapes)}
    points = [
        SizedPoint(
            name=str(shape.shape),
            millions=shape.num_params / 1e6,
            quality=(shape.perplexity if by_text else shape.task_average) or 0.0,
            on_front=shape.shape in front,
        )
        for shape in file.shapes
    ]
    draw_sizes(points, path, metric="perplexity" if by_text else "mean task accuracy")


def _show(file: QualityFile) -> None:
    from amoeba_export.evaluate import pareto

    names = list(dict.fromkeys(name for entry in file.shapes for name in entry.tasks))
    front = {entry.shape for entry in pareto(file.shapes)}
    columns: dict[str, Callable[[ShapeQuality], str]] = {
        "weights": lambda entry: f"{entry.num_params / 1e6:.1f} M",
        "prunable": lambda entry: percent(entry.prunable),
        "perplexity": lambda entry: "-" if entry.perplexity is None else f"{entry.perplexity:.2f}",
        **{name: partial(_accuracy, name) for name in names},
    }
    if len(names) > 1:
        columns["average"] = lambda entry: "-" if entry.task_average is None else f"{100 * entry.task_average:.1f}"
    figures = tuple(columns)
    if len(front) < len(file.shapes):  # else it tells none from another
        columns["front"] = lambda entry: "*" if entry.shape in front else ""
    shown = table("shape", *columns, right=figures)
    for entry in file.shapes:
        shown.add_row(str(entry.shape), *(column(entry) for column in columns.values()))
    answer().print(shown)


def _accuracy(name: str, entry: ShapeQuality) -> str:
    score = entry.tasks.get(name)
    return "-" if score is None else f"{100 * score.score:.1f} +/- {100 * score.stderr:.1f}"
