"""Heal: a short distillation of one cut from the full model, from its refit on.

The loss is the KL divergence of the cut's next-token distribution from the full model's, at every position. All weights
of a small cut are trained. A large one gets changes of low rank, which are merged in the end; norms and biases are
trained beside them.
"""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Callable, Sequence

import torch

from amoeba_export.cache.kinds import HEALING
from amoeba_export.errors import NotForExperts
from amoeba_export.ir import SubnetPlan, Supernet, TensorSpec
from amoeba_export.model.host import Host
from amoeba_export.model.layers import LayerStack
from amoeba_export.model.merged import MergedTensors
from amoeba_export.model.samples import Batch
from amoeba_export.model.workplace import open_workplace
from amoeba_export.refit.data import RefitData, read_data
from amoeba_export.refit.distill import Distillation, Teacher, logits_of, one_by_one
from amoeba_export.refit.recipe import Draw, HealSettings
from amoeba_export.refit.stage import Refitted, adapter_ids, writer_biases
from amoeba_export.refit.student import Student

FULL_WEIGHTS_BELOW = 1_000_000_000
"""Parameters of a cut up to which all of its weights are trained."""
RANK = 64
"""Of the changes of a larger cut."""
LOW_RANK_RATE = 10.0
"""Learning rate of a change, relative to that of a weight."""


def heal(
    supernet: Supernet,
    plan: SubnetPlan,
    specs: Sequence[TensorSpec],
    draw: Draw,
    settings: HealSettings,
    *,
    take: Callable[[Refitted], None],
    host: Host,
    clock: Callable[[], float] = time.monotonic,
) -> None:
    """Train the cut of `plan` to predict what the full model predicts.

    Args:
        supernet: With its adapters and the refit that `plan` names, if it names one.
        plan: What stays. Its refit is where the training starts.
        specs: The weights of the cut model.
        draw: The texts. Its tokens are what an epoch has at most.
        settings: How long.
        take: Is given the result, and has to store what it wants of it before it returns.
        host: Where layers run and checkpoints are kept.
        clock: Seconds.

    Raises:
        InputError: The texts of the recipe cannot be used.
        NotForExperts: The model is a mixture of experts.
        NotANumber: A loss is not finite.
    """
    # Long on purpose: the facts of a run and of its result are listed here.
    if supernet.architecture.expert_size:
        raise NotForExperts("healed", "--heal off")
    device, seed = host.chosen_device, draw.seed
    data = read_data(draw, supernet.text_folder)
    teacher = Teacher(supernet, device)
    cut = LayerStack(supernet, memory_bytes=0, device=device, tensors=MergedTensors(supernet, plan))
    biases = [writer_biases(supernet, plan, kept) for kept in plan.layers]
    is_small = sum(math.prod(spec.shape) for spec in specs) < FULL_WEIGHTS_BELOW
    rank = settings.rank if settings.rank or is_small else RANK
    student = Student(cut, plan, biases, supernet.refit_of(plan), rank=rank, seed=seed)
    facts = {
        "heal": HEALING.version,
        "samples": data.digest,
        "plan": plan.geometry,
        "start": plan.refit_id,
        "strategy": supernet.strategy.identity if supernet.strategy else None,
        "adapters": list(adapter_ids(supernet)),
        "settings": [settings.tokens, settings.seconds, settings.learning_rate, settings.rows, rank, seed],
        "device": device.type,
    }
    with open_workplace(supernet.identity, host) as workplace:
        folder = workplace.folder_of(facts)
        rate = settings.learning_rate * (LOW_RANK_RATE if rank else 1.0)
        run = Distillation(teacher, student, data, settings, rate, folder / "checkpoint.pt", seed, clock)
        before = _losses(student, data)
        run.train(host.progress)
        losses = {"full": _losses(teacher, data), "cut": before, "refit": _losses(student, data)}
        texts = losses["full"]
        facts = {
            "geometry": plan.geometry,
            "model_id": supernet.identity,
            "adapters": list(adapter_ids(supernet)),
            "kind": "heal",
            "settings": {
                "version": HEALING.version,
                **draw.settings,
                "start": plan.refit_id,
                "trained_tokens": run.tokens_done,
                "learning_rate": settings.learning_rate,
                "rows": settings.rows,
                "rank": rank,
            },
            "losses": {text: {name: values[text] for name, values in losses.items()} for text in texts},
        }
        take(Refitted(plan=plan, facts=facts, specs=specs, weights=lambda: student.held(specs)))
        shutil.rmtree(folder, ignore_errors=True)


@torch.no_grad()
def _losses(model: Student | Teacher, data: RefitData) -> dict[str, float]:
    """Text -> mean negative log-likelihood of a token."""
    return {text: _loss(model, samples.batches) for text, (samples, _) in data.texts.items()}


def _loss(model: Student | Teacher, batches: Sequence[Batch]) -> float:
    total, count = 0.0, 0
    for batch in batches:
        for row_1T in one_by_one(batch.tokens_BT):
            logits_TV = logits_of(model, row_1T)[0, :-1]
            target_T = row_1T[0, 1:].to(logits_TV.device)
            total += float(torch.nn.functional.cross_entropy(logits_TV, target_T, reduction="sum"))
            count += len(target_T)
    return total / count
