"""Tiny models, cuts of them, and their refits."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from amoeba_export.ir import Policy, Shape, SubnetPlan, Supernet
from amoeba_export.ir.derive import CutRules, derive_plan
from amoeba_export.load import load_supernet
from amoeba_export.load.refit import write_refit
from amoeba_export.model.host import Host
from amoeba_export.refit import Draw, RefitRecipe
from amoeba_export.refit.data import read_data
from amoeba_export.refit.stage import Refitted, refit
from tests.materialize.subnets import noise_strategy
from tests.model.models import save_tokenizer
from tests.tiny import VOCAB, save_tiny

IDS = torch.randint(0, VOCAB, (2, 9), generator=torch.Generator().manual_seed(5))


def opened(folder: Path, family: str = "llama", **overrides: Any) -> Supernet:
    save_tiny(folder, family, **overrides)
    save_tokenizer(folder)
    supernet = load_supernet(str(folder))
    return dataclasses.replace(supernet, strategy=noise_strategy(supernet.architecture))


def cut(supernet: Supernet, shape: str = "3x0.6", policy: Policy = "uniform") -> SubnetPlan:
    assert supernet.strategy is not None
    plan = derive_plan(supernet.strategy, supernet.architecture, Shape.parse(shape), CutRules(policy=policy))
    return dataclasses.replace(plan, model_id=supernet.identity)


def fitted(
    supernet: Supernet, plans: Sequence[SubnetPlan], recipe: RefitRecipe, folder: Path, **settings: Any
) -> tuple[Supernet, list[SubnetPlan]]:
    """The plans with names of refits, and the supernet that has these."""
    found: list[SubnetPlan] = []
    refits = {}

    def take(made: Sequence[Refitted]) -> None:
        for i, one in enumerate(made):
            path = folder / f"refit-{i}.safetensors"
            held = write_refit(path, one.facts, one.specs, one.weights(), dtype=torch.float32)
            refits[held.identity] = held
            found.append(dataclasses.replace(one.plan, refit_id=held.identity))

    folder.mkdir(exist_ok=True)
    refit(supernet, plans, Draw(recipe=recipe), take=take, host=Host(**settings))
    return dataclasses.replace(supernet, refits=refits), found


@torch.no_grad()
def loss_of(model: Any, recipe: RefitRecipe, folder: Path, text: str) -> float:
    samples, _ = read_data(Draw(recipe=recipe), folder).texts[text]
    tokens_BT = torch.cat([batch.tokens_BT for batch in samples.batches])
    logits_BTV = model(tokens_BT).logits[:, :-1]
    loss = torch.nn.functional.cross_entropy(logits_BTV.reshape(-1, VOCAB), tokens_BT[:, 1:].reshape(-1))
    return float(loss)


class Stopping:
    """Progress that ends the work after some layers, as a signal would."""

    def __init__(self, after: int) -> None:
        self._left = after

    def note(self, message: str) -> None:
        pass

    warn = note

    @contextmanager
    def track(self, description: str, total: int) -> Any:
        def advance(steps: int) -> None:
            self._left -= 1
            if not self._left:
                raise KeyboardInterrupt

        yield advance
