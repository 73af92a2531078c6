"""`amoeba finetune`: Stage 2."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from amoeba_export.cli.artifacts import command
from amoeba_export.cli.completion import complete_from
from amoeba_export.cli.console import Talk, answer, facts, print_json, titled
from amoeba_export.cli.options import AsJson, Model, PolicyName, model_or_default, split_commas
from amoeba_export.errors import BadValue
from amoeba_export.ir.dtype import TRAINED_DTYPES

_ADAPTER, _SHAPES, _OBJECTIVE, _RUN = "Adapter", "Shapes", "Objective", "Run"


def finetune(
    strategy: Annotated[Path, typer.Option("--strategy", metavar="F", help="What calibration found.")],
    data: Annotated[
        Path,
        typer.Option("--data", metavar="F", help="JSONL with instructions, chat messages or texts; or plain text."),
    ],
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="The adapter folder. It appears when all is done.")],
    model: Model = None,
    mode: Annotated[
        str,
        typer.Option(
            "--mode",
            metavar="smol|lora",
            help="A shape-aware mixture of LoRAs, or one plain LoRA (a PEFT adapter).",
            autocompletion=complete_from(("smol", "lora")),
            rich_help_panel=_ADAPTER,
        ),
    ] = "smol",
    rank: Annotated[int, typer.Option("--rank", metavar="N", help="Of each expert.", rich_help_panel=_ADAPTER)] = 16,
    alpha: Annotated[
        float,
        typer.Option("--alpha", metavar="X", help="Changes are scaled by alpha / rank.", rich_help_panel=_ADAPTER),
    ] = 32.0,
    experts: Annotated[
        int, typer.Option("--experts", metavar="N", help="LoRAs per weight.", rich_help_panel=_ADAPTER)
    ] = 5,
    top_k: Annotated[
        int, typer.Option("--top-k", metavar="N", help="Experts that a shape mixes.", rich_help_panel=_ADAPTER)
    ] = 2,
    targets: Annotated[
        str | None,
        typer.Option(
            "--targets", metavar="W,W", help="Weights to adapt, such as q_proj,v_proj. All.", rich_help_panel=_ADAPTER
        ),
    ] = None,
    gate_warmup: Annotated[
        float,
        typer.Option(
            "--gate-warmup", metavar="X", help="Share of the steps with a noisy gate.", rich_help_panel=_ADAPTER
        ),
    ] = 0.25,
    subnets: Annotated[
        int,
        typer.Option(
            "--subnets",
            metavar="N",
            help="Shapes per batch: the full one, random ones, the smallest.",
            rich_help_panel=_SHAPES,
        ),
    ] = 4,
    depths: Annotated[
        str | None,
        typer.Option("--depths", metavar="N,N", help="Depths to draw. All of the strategy's.", rich_help_panel=_SHAPES),
    ] = None,
    widths: Annotated[
        str, typer.Option("--widths", metavar="X,X", help="Widths to draw.", rich_help_panel=_SHAPES)
    ] = "1,0.875,0.75,0.625",
    shape: Annotated[
        str | None,
        typer.Option("--shape", metavar="DEPTHxWIDTH", help="Train this shape alone.", rich_help_panel=_SHAPES),
    ] = None,
    policy: PolicyName = "uniform",
    kd_weight: Annotated[
        float,
        typer.Option(
            "--kd-weight",
            metavar="X",
            help="Of learning from the full net, against learning from labels.",
            rich_help_panel=_OBJECTIVE,
        ),
    ] = 1.0,
    temperature: Annotated[
        float,
        typer.Option("--temperature", metavar="X", help="Of learning from the full net.", rich_help_panel=_OBJECTIVE),
    ] = 1.0,
    balance: Annotated[
        bool,
        typer.Option("--balance/--no-balance", help="Scale every loss to the full net's.", rich_help_panel=_OBJECTIVE),
    ] = True,
    mask: Annotated[
        str,
        typer.Option(
            "--mask",
            metavar="shifted|unshifted",
            help="Distil where a label is predicted, or (as published) where one is.",
            autocompletion=complete_from(("shifted", "unshifted")),
            rich_help_panel=_OBJECTIVE,
        ),
    ] = "shifted",
    max_steps: Annotated[
        int, typer.Option("--max-steps", metavar="N", help="Optimizer steps.", rich_help_panel=_RUN)
    ] = 1000,
    batch_size: Annotated[
        int, typer.Option("--batch-size", metavar="N", help="Rows, per device.", rich_help_panel=_RUN)
    ] = 4,
    gradient_accumulation: Annotated[
        int, typer.Option("--gradient-accumulation", metavar="N", help="Batches per step.", rich_help_panel=_RUN)
    ] = 1,
    learning_rate: Annotated[
        float, typer.Option("--learning-rate", metavar="X", help="At its highest.", rich_help_panel=_RUN)
    ] = 2e-4,
    schedule: Annotated[
        str,
        typer.Option(
            "--schedule",
            metavar="NAME",
            help="constant, constant_with_warmup, linear or cosine.",
            autocompletion=complete_from(("constant", "constant_with_warmup", "linear", "cosine")),
            rich_help_panel=_RUN,
        ),
    ] = "cosine",
    warmup: Annotated[
        float, typer.Option("--warmup", metavar="X", help="Share of the steps that it rises.", rich_help_panel=_RUN)
    ] = 0.03,
    weight_decay: Annotated[
        float, typer.Option("--weight-decay", metavar="X", help="AdamW's.", rich_help_panel=_RUN)
    ] = 0.0,
    max_grad_norm: Annotated[
        float, typer.Option("--max-grad-norm", metavar="X", help="Clip to it; 0: never.", rich_help_panel=_RUN)
    ] = 0.3,
    max_length: Annotated[
        int, typer.Option("--max-length", metavar="N", help="Tokens of a row.", rich_help_panel=_RUN)
    ] = 512,
    packing: Annotated[
        bool, typer.Option("--packing/--no-packing", help="Several examples in a row.", rich_help_panel=_RUN)
    ] = True,
    prompt_format: Annotated[
        str,
        typer.Option(
            "--prompt-format",
            metavar="auto|alpaca|chat",
            help="How instructions become text: the chat template if there is one, or Alpaca's words.",
            autocompletion=complete_from(("auto", "alpaca", "chat")),
            rich_help_panel=_RUN,
        ),
    ] = "auto",
    dtype: Annotated[
        str,
        typer.Option(
            "--dtype",
            metavar="|".join(TRAINED_DTYPES),
            help="Of the frozen weights and activations.",
            autocompletion=complete_from(TRAINED_DTYPES),
            rich_help_panel=_RUN,
        ),
    ] = "fp32",
    gradient_checkpointing: Annotated[
        bool, typer.Option("--gradient-checkpointing", help="Less memory, more time.", rich_help_panel=_RUN)
    ] = False,
    save_every: Annotated[
        int, typer.Option("--save-every", metavar="N", help="Steps between checkpoints.", rich_help_panel=_RUN)
    ] = 100,
    seed: Annotated[int, typer.Option("--seed", metavar="N", help="Of everything random.", rich_help_panel=_RUN)] = 0,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with an unfinished run.", rich_help_panel=_RUN)
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace what is there.", rich_help_panel=_RUN)] = False,
    as_json: AsJson = False,
) -> None:
    """Train adapters for every shape in one run (Stage 2).

    A run that was stopped goes on with `--resume`.

    Several devices: `accelerate launch $(command -v amoeba) finetune ...`, or torchrun in its place.
    """
    chosen_widths = tuple(_numbers("--widths", widths))
    chosen_depths = tuple(int(depth) for depth in _numbers("--depths", depths or ""))

    from amoeba_export.application.finetune import finetune as run
    from amoeba_export.finetune import LowRankSettings, ObjectiveSettings, Settings
    from amoeba_export.finetune.settings import TARGETS

    settings = Settings(
        low_rank=LowRankSettings(
            mode=mode,  # type: ignore[arg-type]  # checked below, with everything else
            rank=rank,
            alpha=alpha,
            experts=experts,
            top_k=top_k,
            gate_warmup=gate_warmup,
            targets=TARGETS if targets is None else tuple(split_commas(targets) or ()),
        ),
        objective=ObjectiveSettings(
            kd_weight=kd_weight,
            temperature=temperature,
            balance=balance,
            mask=mask,  # type: ignore[arg-type]
        ),
        subnets=subnets,
        depths=chosen_depths,
        widths=chosen_widths,
        policy=policy,  # type: ignore[arg-type]
        max_steps=max_steps,
        batch_size=batch_size,
        gradient_accumulation=gradient_accumulation,
        max_length=max_length,
        packing=packing,
        prompt=prompt_format,
        learning_rate=learning_rate,
        schedule=schedule,
        warmup=warmup,
        weight_decay=weight_decay,
        max_grad_norm=max_grad_norm,
        dtype=dtype,
        gradient_checkpointing=gradient_checkpointing,
        save_every=save_every,
        seed=seed,
    )
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
    smallest = shape or next(reversed(losses))
    following = ("amoeba", "export", name, "--strategy", strategy, "--adapter", out, "--shape", smallest)
    console.print(f"next: {command(*following)}")


def _numbers(option: str, text: str) -> list[float]:
    try:
        return [float(part) for part in split_commas(text) or ()]
    except ValueError as error:
        raise BadValue(option, text, "numbers with commas between them") from error
