"""Stage 2: one run that trains adapters for every shape (paper sec. 3.3; upstream `trainer.py`, `training_step`).

From its checks to the adapter's folder; what a step does is in `loop.py`.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from amoeba_export.errors import InputError, NotForExperts, UnsupportedError
from amoeba_export.finetune.adapter import write_adapter
from amoeba_export.finetune.card import write_card
from amoeba_export.finetune.checkpoint import Run
from amoeba_export.finetune.loop import Loop
from amoeba_export.finetune.plot import plot_losses
from amoeba_export.finetune.sampling import one_shape, sandwich
from amoeba_export.finetune.settings import TARGETS, Settings
from amoeba_export.ir import SILENT, Family, Progress, Shape, Strategy, Supernet
from amoeba_export.ir.family import LINEARS
from amoeba_export.version import __version__


@dataclass(frozen=True, slots=True, kw_only=True)
class Finetuned:
    """A finished run.

    Attributes:
        folder: The adapter.
        steps: Optimizer steps, of all sessions together.
        tokens: Tokens read, not counted again for every subnet.
        losses: Shape -> mean cross-entropy on labels over the last tenth of the steps, where it was drawn.
    """

    folder: Path
    steps: int
    tokens: int
    losses: Mapping[Shape, float]


def finetune_adapter(
    supernet: Supernet,
    *,
    data: Path,
    out: Path,
    settings: Settings | None = None,
    shape: Shape | None = None,
    resume: bool = False,
    force: bool = False,
    progress: Progress = SILENT,
) -> Finetuned:
    """Train an adapter and write its folder.

    Args:
        supernet: With a strategy, without adapters.
        data: JSONL or plain text; see `data.py`.
        out: The adapter folder. It appears when the run is done; until then the run lies beside it (`checkpoint.py`).
        settings: How.
        shape: Train this shape alone, on labels: the baseline of one adapter per shape.
        resume: Go on with an unfinished run, if there is one.
        force: Replace what is there.
        progress: Told the resolved plan, and every step.

    Raises:
        UsageError: A setting that cannot be, or a loss that is not finite.
        InputError: Something is wrong with the data, or there is no strategy.
    """
    settings = settings or Settings()
    settings.check()
    settings = _without_experts(settings, supernet.family, progress)
    strategy = _only_strategy(supernet)
    sampler = one_shape(shape) if shape else sandwich(strategy, settings)
    accelerator = Accelerator(cpu=not torch.accelerator.is_available())  # without `cpu`, processes on a CPU do not join
    facts = _facts(supernet, settings, data, shape, accelerator)
    run = Run(out, facts, resume=resume, force=force) if accelerator.is_main_process else None
    accelerator.wait_for_everyone()
    try:
        loop = Loop(supernet, settings, sampler, data, accelerator, progress)
        records = loop.train(run or Run.joined(out))
        if run:

            def fill(folder: Path) -> None:
                write_adapter(folder, loop.low_rank, base_model=supernet.name)
                write_card(folder, supernet, settings, sampler, facts)
                plot_losses(records, folder / "loss.png", progress=progress)

            run.publish(fill)
    except BaseException:
        if run:
            run.give_up()
        raise
    accelerator.wait_for_everyone()
    return Finetuned(
        folder=out,
        steps=settings.max_steps,
        tokens=sum(record["tokens"] for record in records),
        losses=_last_losses(records),
    )


def _facts(
    supernet: Supernet, settings: Settings, data: Path, shape: Shape | None, accelerator: Accelerator
) -> dict[str, Any]:
    """What decides the adapter."""
    return {
        "amoeba": __version__,
        "model": supernet.identity,
        "strategy": supernet.strategy and supernet.strategy.identity,
        "data": _sha256(data),
        "shape": str(shape) if shape else None,
        "processes": accelerator.num_processes,
        "settings": settings.to_json(),
    }


def _only_strategy(supernet: Supernet) -> Strategy:
    """The strategy of a model without adapters. Raises `InputError`, `UnsupportedError`."""
    if supernet.strategy is None:
        raise InputError(
            "Fine-tuning needs a strategy.", next_step="Make one with 'amoeba calibrate' and give it with --strategy."
        )
    if supernet.adapters:
        raise UnsupportedError(
            "Fine-tuning starts from a model without adapters.",
            next_step="Export the full shape with the adapters merged, and fine-tune the result.",
        )
    return supernet.strategy


def _without_experts(settings: Settings, family: Family, progress: Progress) -> Settings:
    """`settings` that adapt nothing of experts: all targets are then those of attention."""
    targets = settings.low_rank.targets
    of_experts = {
        target for target, role in zip(TARGETS, LINEARS, strict=True) if role in {one.role for one in family.experts}
    }
    if not of_experts & set(targets):
        return settings
    kept = tuple(target for target in targets if target not in of_experts)
    if targets != TARGETS:
        raise NotForExperts("adapted", f"--targets {','.join(kept or sorted(set(TARGETS) - of_experts))}")
    progress.note(f"Adapting {', '.join(kept)}: experts and their router are left as they are.")
    return dataclasses.replace(settings, low_rank=dataclasses.replace(settings.low_rank, targets=kept))


def _last_losses(records: Sequence[Mapping[str, Any]]) -> dict[Shape, float]:
    found: dict[Shape, list[float]] = defaultdict(list)
    for record in records[-max(len(records) // 10, 1) :]:
        for subnet in record["subnets"]:
            found[Shape.parse(subnet["shape"])].append(subnet["cross_entropy"])
    return {shape: sum(values) / len(values) for shape, values in sorted(found.items(), reverse=True)}


def _sha256(path: Path) -> str | None:
    """None for a file that is not there: reading it says so better."""
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None
