"""Options of `amoeba finetune`: one for every field of its settings, with the name, type and default that it has."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Annotated, Any, get_args

import typer

from amoeba_export.cli.completion import complete_from
from amoeba_export.cli.options import floats, integers, split_commas
from amoeba_export.finetune.settings import MASK_FORMS, MODES, PROMPTS, SCHEDULES, TARGETS, Settings
from amoeba_export.ir import Policy
from amoeba_export.ir.dtype import TRAINED_DTYPES

ADAPTER, SHAPES, SUBNET, OBJECTIVE, RUN = "Adapter", "Shapes", "Subnet", "Objective", "Run"
"""Panels of the help, in their order."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Told:
    """What a field's name and default do not say.

    Attributes:
        metavar: Left out: the choices, or nothing for a switch.
        option: Where it is not called as the field is.
    """

    help: str
    panel: str
    metavar: str | None = None
    choices: Sequence[str] = ()
    option: str | None = None


TOLD = {
    "mode": _Told(
        help="A shape-aware mixture of LoRAs, or one plain LoRA (a PEFT adapter).", panel=ADAPTER, choices=MODES
    ),
    "rank": _Told(help="Rank of each LoRA.", panel=ADAPTER, metavar="N"),
    "alpha": _Told(help="Updates are scaled by alpha / rank.", panel=ADAPTER, metavar="X"),
    "experts": _Told(help="Number of LoRAs per weight.", panel=ADAPTER, metavar="N"),
    "top_k": _Told(help="Number of LoRAs that a shape mixes.", panel=ADAPTER, metavar="N"),
    "targets": _Told(help="Weights to adapt, such as q_proj,v_proj. Default: all.", panel=ADAPTER, metavar="W,W"),
    "gate_warmup": _Told(help="Share of the steps in which the gate is noisy.", panel=ADAPTER, metavar="X"),
    "kd_weight": _Told(
        help="Weight of the distillation from the full model; the labels get the rest.", panel=OBJECTIVE, metavar="X"
    ),
    "temperature": _Told(help="Temperature of the distillation.", panel=OBJECTIVE, metavar="X"),
    "balance": _Told(help="Scale the loss of every shape to that of the full model.", panel=OBJECTIVE),
    "mask": _Told(
        help="Distil positions that predict a label, or (as published) that hold one.",
        panel=OBJECTIVE,
        choices=MASK_FORMS,
    ),
    "subnets": _Told(
        help="Number of shapes per batch: the full one, random ones, the smallest.", panel=SHAPES, metavar="N"
    ),
    "depths": _Told(help="Depths to draw from. Default: all in the strategy.", panel=SHAPES, metavar="N,N"),
    "widths": _Told(help="Widths to draw from.", panel=SHAPES, metavar="X,X"),
    "policy": _Told(
        help="All layers keep the same number of heads and neurons, or each its own.",
        panel=SUBNET,
        choices=get_args(Policy),
    ),
    "max_steps": _Told(help="Number of optimizer steps.", panel=RUN, metavar="N"),
    "batch_size": _Told(help="Rows per batch and device.", panel=RUN, metavar="N"),
    "gradient_accumulation": _Told(help="Batches per optimizer step.", panel=RUN, metavar="N"),
    "max_length": _Told(help="Tokens per row.", panel=RUN, metavar="N"),
    "packing": _Told(help="Pack several examples into a row.", panel=RUN),
    "prompt": _Told(
        help="Format of instructions. auto: the chat template if there is one, else alpaca.",
        panel=RUN,
        choices=PROMPTS,
        option="--prompt-format",
    ),
    "learning_rate": _Told(help="Peak learning rate.", panel=RUN, metavar="X"),
    "schedule": _Told(
        help=f"Shape of the learning rate: {', '.join(SCHEDULES[:-1])} or {SCHEDULES[-1]}.",
        panel=RUN,
        metavar="NAME",
        choices=SCHEDULES,
    ),
    "warmup": _Told(help="Share of the steps in which the learning rate rises.", panel=RUN, metavar="X"),
    "weight_decay": _Told(help="Weight decay of AdamW.", panel=RUN, metavar="X"),
    "max_grad_norm": _Told(help="Clip gradients to this norm. 0: no clipping.", panel=RUN, metavar="X"),
    "dtype": _Told(help="Precision of the frozen weights and the activations.", panel=RUN, choices=TRAINED_DTYPES),
    "gradient_checkpointing": _Told(help="Recompute activations: less memory, more time.", panel=RUN),
    "save_every": _Told(help="Steps between checkpoints.", panel=RUN, metavar="N"),
    "seed": _Told(help="Seed of the run.", panel=RUN, metavar="N"),
}


def with_settings(command: Callable[..., None]) -> Callable[..., None]:
    """`command` with an option for every field in the place of its parameter `settings`, which it gets made of them."""
    own = inspect.signature(command, eval_str=True).parameters
    parameters: list[inspect.Parameter] = []
    for parameter in own.values():
        parameters += _parameters() if parameter.name == "settings" else [parameter]

    @functools.wraps(command)
    def run(**given: Any) -> None:
        command(
            **{name: value for name, value in given.items() if name in own},
            settings=settings_of({name: value for name, value in given.items() if name not in own}),
        )

    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return run


def settings_of(given: Mapping[str, Any]) -> Settings:
    """Settings of the options as they were given, by field. Raises `BadValue` for what is no list of numbers."""
    values = dict(given)
    values["targets"] = TARGETS if values["targets"] is None else split_commas(values["targets"])
    values["depths"] = integers("--depths", values["depths"])
    values["widths"] = floats("--widths", values["widths"])
    groups = {
        name: kind(**{one.name: values.pop(one.name) for one in dataclasses.fields(kind)}) for name, kind in _groups()
    }
    return Settings(**groups, **values)


def _groups() -> Iterator[tuple[str, Any]]:
    """Fields of the settings that are settings themselves, with their classes."""
    for one in dataclasses.fields(Settings):
        if one.default_factory is not dataclasses.MISSING:
            yield one.name, one.default_factory


def _parameters() -> Iterator[inspect.Parameter]:
    groups = dict(_groups())
    for field in dataclasses.fields(Settings):
        for one in dataclasses.fields(groups[field.name]) if field.name in groups else [field]:
            told, (kind, default) = TOLD[one.name], _typed(one.name, one.default)
            option = told.option or f"--{one.name.replace('_', '-')}"
            if default is True:
                option = f"{option}/--no-{option[2:]}"
            info = typer.Option(
                option,
                metavar=told.metavar or "|".join(told.choices) or None,
                help=told.help,
                autocompletion=complete_from(tuple(told.choices)) if told.choices else None,
                rich_help_panel=told.panel,
            )
            yield inspect.Parameter(
                one.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[kind, info]
            )


def _typed(name: str, default: Any) -> tuple[Any, Any]:
    """Type and default on the command line, where a list is text with commas in it; None where all is meant."""
    if not isinstance(default, tuple):
        return type(default), default
    if not default or default == TARGETS:
        return str | None, None
    return str, ",".join(f"{value:g}" for value in default)
