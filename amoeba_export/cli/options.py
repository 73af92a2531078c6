"""Arguments and options that several commands share, with their help, defaults and completion."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, get_args

import typer

from amoeba_export.cli.completion import complete_formats, complete_from, complete_recipes, complete_targets
from amoeba_export.errors import BadValue
from amoeba_export.ir import Metric, Policy
from amoeba_export.ir.dtype import AUTO, DTYPE_NAMES

CONFIG_NAME = "amoeba.toml"


def split_commas(text: str | None) -> tuple[str, ...] | None:
    """`onnx,gguf` as its parts; None for None."""
    if text is None:
        return None
    return tuple(part.strip() for part in text.split(",") if part.strip())


def floats(option: str, text: str | None) -> tuple[float, ...]:
    """`1,0.75` as numbers. Raises `BadValue`."""
    try:
        return tuple(float(part) for part in split_commas(text) or ())
    except ValueError as error:
        raise BadValue(option, str(text), "numbers with commas between them") from error


def integers(option: str, text: str | None) -> tuple[int, ...]:
    """`12,10` as whole numbers. Raises `BadValue`."""
    try:
        return tuple(int(part) for part in split_commas(text) or ())
    except ValueError as error:
        raise BadValue(option, str(text), "whole numbers with commas between them") from error


def model_or_default(model: str | None) -> str:
    """`model`; left out, the `[model]` table of amoeba.toml in the working directory, else `demo`.

    Raises:
        BadConfig: amoeba.toml has mistakes.
    """
    if model is not None:
        return model
    path = Path(CONFIG_NAME)
    if not path.is_file():
        return "demo"
    from amoeba_export.builds.read import read_model

    return read_model(path)


Model = Annotated[
    str | None,
    typer.Argument(
        metavar="MODEL",
        help="Model folder, hub id or demo. Default: the model in amoeba.toml, else demo.",
        show_default=False,
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout.")]
Adapters = Annotated[
    list[Path] | None,
    typer.Option(
        "--adapter",
        metavar="DIR",
        help="LoRA or SMoL adapter to merge. Repeatable; the order counts.",
        rich_help_panel="Subnet",
    ),
]
StrategyFile = Annotated[
    Path | None,
    typer.Option(
        "--strategy",
        metavar="F",
        help="Strategy file. Default: calibrate with --recipe if needed, and keep the result.",
        rich_help_panel="Subnet",
    ),
]
RecipeName = Annotated[
    str,
    typer.Option(
        "--recipe",
        metavar="quick|default|F",
        help="Recipe of a calibration without --strategy: a built-in name, or your own TOML file.",
        autocompletion=complete_recipes,
        rich_help_panel="Subnet",
    ),
]
RefitName = Annotated[
    str | None,
    typer.Option(
        "--refit",
        metavar="off|fast|full|FILE",
        help="Fit the remaining weights to make up for the cut. FILE: weights fitted before. Default: full.",
        rich_help_panel="Quality",
    ),
]
RoundingName = Annotated[
    str | None,
    typer.Option(
        "--rounding",
        metavar="data|nearest",
        help="How to round to 4 bits. Default: data, if the model has a tokenizer; nearest for q4_k_m and q5_k_m.",
        rich_help_panel="Quality",
    ),
]
VocabKeep = Annotated[
    str | None,
    typer.Option(
        "--vocab-keep",
        metavar="N|FILE",
        help="Compute the logits of some tokens only (ONNX): the N most frequent tokens of the refit's texts, the "
        "tokens of a text, or a JSON list of ids. Default: all.",
        rich_help_panel="Quality",
    ),
]
HealFor = Annotated[
    str | None,
    typer.Option(
        "--heal",
        metavar="20m|2Mtok|off",
        help="After the refit, distil from the full model for a time or a number of tokens. Default: as the refit's "
        "recipe says, for models up to 500M parameters.",
        rich_help_panel="Quality",
    ),
]
CalibrationData = Annotated[
    list[Path] | None,
    typer.Option(
        "--calibration-data",
        metavar="F",
        help="Text or JSONL from your domain, for half of the tokens of refit, heal and rounding. Repeatable.",
        rich_help_panel="Quality",
    ),
]
PlotFiles = Annotated[
    list[Path] | None,
    typer.Option(
        "--plot",
        metavar="F",
        help="Draw latency against quality, as .png, .svg, .pdf, .html or .json. Repeatable.",
    ),
]
Seed = Annotated[
    int,
    typer.Option(
        "--seed", metavar="N", help="Seed for drawing the samples of the calibration.", rich_help_panel="Subnet"
    ),
]
Prompt = Annotated[
    int,
    typer.Option(
        "--prompt", metavar="N", help="Number of prompt tokens; decode is timed after them.", rich_help_panel="Latency"
    ),
]
Generate = Annotated[
    int,
    typer.Option(
        "--generate", metavar="N", help="Number of tokens to generate; e2e includes them.", rich_help_panel="Latency"
    ),
]
Batch = Annotated[
    int, typer.Option("--batch", metavar="N", help="Number of sequences in a batch.", rich_help_panel="Latency")
]
Latency = Annotated[
    str | None,
    typer.Option(
        "--latency",
        metavar="B",
        help="Latency budget: 50ms, 0.05s, or 75% of the full model's. Several: decode=50ms,prefill=300ms.",
        rich_help_panel="Latency",
    ),
]
Throughput = Annotated[
    str | None,
    typer.Option(
        "--throughput",
        metavar="N",
        help="Budget as a decode speed of the whole batch, such as 30tok/s.",
        rich_help_panel="Latency",
    ),
]
Memory = Annotated[
    str | None,
    typer.Option(
        "--memory",
        metavar="N",
        help="Memory limit, such as 900MB. The target's own limit still holds.",
        rich_help_panel="Latency",
    ),
]


Quality = Annotated[
    str | None,
    typer.Option(
        "--quality",
        metavar="X",
        help="Highest loss (or lowest accuracy) to accept. Without --latency: take the fastest such model.",
        rich_help_panel="Quality",
    ),
]
QualityLoss = Annotated[
    str | None,
    typer.Option(
        "--quality-loss",
        metavar="5%",
        help="The same limit, as the share by which it may be worse than the full model.",
        rich_help_panel="Quality",
    ),
]


def _target(panel: str | None = None) -> Any:
    return typer.Option(
        "--target",
        metavar="NAME|FILE",
        help="The device and its runtime; 'amoeba targets' lists them.",
        autocompletion=complete_targets,
        rich_help_panel=panel,
    )


Target = Annotated[str, _target()]
OptionalTarget = Annotated[str | None, _target()]
TargetName = Annotated[str | None, _target("Latency")]
MetricName = Annotated[
    str | None,
    typer.Option(
        "--metric",
        metavar="|".join(get_args(Metric)),
        help="The latency that the budget limits. Default: the target's metric.",
        autocompletion=complete_from(get_args(Metric)),
        rich_help_panel="Latency",
    ),
]
Percentile = Annotated[
    int,
    typer.Option("--percentile", metavar="50|90", help="Percentile of the measured times.", rich_help_panel="Latency"),
]
PolicyName = Annotated[
    str,
    typer.Option(
        "--policy",
        metavar="|".join(get_args(Policy)),
        help="All layers keep the same number of heads and neurons, or each its own.",
        autocompletion=complete_from(get_args(Policy)),
        rich_help_panel="Subnet",
    ),
]
Formats = Annotated[
    str | None,
    typer.Option(
        "--format",
        metavar="F,F",
        help="Formats to write, such as safetensors,onnx,gguf. Default: the target's formats.",
        autocompletion=complete_formats,
        rich_help_panel="Output",
    ),
]
Dtype = Annotated[
    str | None,
    typer.Option(
        "--dtype",
        metavar="|".join(DTYPE_NAMES),
        help="Precision of the weights. Default: the target's first.",
        autocompletion=complete_from(DTYPE_NAMES),
        rich_help_panel="Output",
    ),
]
SearchedDtype = Annotated[
    str | None,
    typer.Option(
        "--dtype",
        metavar="|".join((*DTYPE_NAMES, AUTO)),
        help="Precision of the weights. Default: auto, the best of the target's precisions.",
        autocompletion=complete_from((*DTYPE_NAMES, AUTO)),
        rich_help_panel="Output",
    ),
]
