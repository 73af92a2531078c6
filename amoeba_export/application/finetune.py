"""Stage 2 as one call: open the model with its strategy, train an adapter for all of its shapes."""

from __future__ import annotations

from pathlib import Path

from amoeba_export.finetune import Finetuned, Settings, finetune_adapter
from amoeba_export.ir import SILENT, Progress, Shape
from amoeba_export.load import load_supernet


def finetune(
    model: str = "demo",
    *,
    strategy: Path,
    data: Path,
    out: Path,
    settings: Settings | None = None,
    shape: str | None = None,
    resume: bool = False,
    force: bool = False,
    progress: Progress = SILENT,
) -> Finetuned:
    """Train adapters for every shape of `model` in one run.

    The settings are checked before the model is opened.

    Args:
        model: A model folder, a hub id, or `demo`.
        strategy: What calibration found.
        data: JSONL with instructions, chat messages or texts; or plain text.
        out: The adapter folder. It appears when all is done.
        settings: How to train; None for the usual way.
        shape: Train this one alone, such as `24x0.75` (layers x width): one adapter per shape.
        resume: Go on with an unfinished run, if there is one.
        force: Replace what is there.
        progress: Told the resolved plan, and every step.

    Returns:
        The adapter's folder, with steps, tokens and the loss of each shape (cross-entropy in nats per token).

    Raises:
        UsageError: A setting that cannot be, or a loss that is not finite.
        InputError: The model, the strategy or the data cannot be used, or do not belong together.
    """
    # Long on purpose: three files, and what cannot be a setting, because the adapter does not depend on it.
    settings = settings or Settings()
    one = Shape.parse(shape) if shape else None
    settings.check()
    supernet = load_supernet(model, strategy=strategy, progress=progress)
    return finetune_adapter(
        supernet, data=data, out=out, settings=settings, shape=one, resume=resume, force=force, progress=progress
    )
