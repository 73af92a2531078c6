"""The training of a heal: a cut learns what the full model predicts, from its checkpoint on where one is there."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from amoeba_export.errors import NotANumber
from amoeba_export.ir import Progress, Supernet
from amoeba_export.model.layers import LayerStack
from amoeba_export.model.merged import MergedTensors
from amoeba_export.refit.data import RefitData
from amoeba_export.refit.recipe import HealSettings
from amoeba_export.refit.student import Student
from amoeba_export.replacing import replacing

WARM_UP = 0.03
"""Share of the steps in which the learning rate rises."""
CHECKS = 12
"""How often the held-out loss is looked at, at most."""
CHECK_SPACING = 5
"""Times the held-out tokens that are trained on between two looks: a look costs a tenth of that."""
PATIENCE = 3
"""Looks without a better held-out loss before it ends."""
SAVE_SECONDS = 120.0
SHOWN = 100
"""Steps of the progress that is shown: hundredths of the budget, whatever limits it."""


class Teacher:
    """The full model with its adapters, in memory."""

    def __init__(self, supernet: Supernet, device: torch.device) -> None:
        tensors = MergedTensors(supernet, supernet.full_plan())
        self._stack = LayerStack(supernet, memory_bytes=1 << 62, device=device, tensors=tensors)
        self._head_VD = self._stack.weight(self._stack.head_name())

    def project(self, hidden_BTD: torch.Tensor) -> torch.Tensor:
        """Logits of final hidden states. [B, T, V]."""
        return self._stack.logits(hidden_BTD @ self._head_VD.T)

    @torch.no_grad()
    def __call__(self, tokens_BT: torch.Tensor) -> torch.Tensor:
        """Final hidden states, normed. [B, T, D]."""
        hidden_BTD = self._stack.embed(tokens_BT)
        for layer_idx in range(self._stack.architecture.num_layers):
            hidden_BTD = self._stack.run(self._stack.layer(layer_idx), hidden_BTD)
        return self._stack.norm(hidden_BTD)


class Distillation:
    """One training. What it needs to go on after a stop is in its checkpoint."""

    def __init__(
        self,
        teacher: Teacher,
        student: Student,
        data: RefitData,
        settings: HealSettings,
        rate: float,
        checkpoint: Path,
        seed: int,
        clock: Callable[[], float],
    ) -> None:
        self._teacher, self._student, self._data, self._settings = teacher, student, data, settings
        self._rate, self._checkpoint, self._seed, self._clock = rate, checkpoint, seed, clock
        self._trained = student.trained()
        self._optimizer = torch.optim.AdamW(
            self._trained.values(), lr=rate, betas=(0.9, 0.95), weight_decay=0.0, fused=True
        )
        self._rows = torch.cat([batch.tokens_BT for batch in data.fit.batches])
        self._state: dict[str, Any] = {"step": 0, "seconds": 0.0, "best": math.inf, "since_best": 0, "checks": 0}
        self._best: dict[str, torch.Tensor] = {}

    @property
    def tokens_done(self) -> int:
        """Tokens that the student was trained on."""
        return int(self._state["step"]) * self._settings.rows * self._rows.shape[1]

    def train(self, progress: Progress) -> None:
        """Train until the budget is used up or the held-out loss no longer falls; keep the best weights."""
        self._load()
        started, saved = self._clock() - self._state["seconds"], self._clock()
        per_step = self._settings.rows * self._rows.shape[1]
        num_steps = max(1, self._settings.tokens // per_step)
        if not self._state["checks"]:
            self._check()
        shown = 0
        with progress.track("Healing", SHOWN) as advance:
            for rows in self._draws(num_steps):
                share = self._share(num_steps)
                if share >= 1:
                    break
                self._step(rows, share)
                self._state["step"] += 1
                self._state["seconds"] = self._clock() - started
                done = min(SHOWN, int(SHOWN * self._share(num_steps)))
                advance(done - shown)
                shown = done
                if self._is_time_to_check(num_steps):
                    self._check()
                    if self._state["since_best"] >= PATIENCE:
                        progress.note("The held-out loss no longer falls.")
                        break
                if self._clock() - saved > SAVE_SECONDS:
                    self._save()
                    saved = self._clock()
        self._check()
        with torch.no_grad():
            for name, weight in self._trained.items():
                weight.copy_(self._best[name])

    def _is_time_to_check(self, num_steps: int) -> bool:
        """Whether the share of the budget and the tokens since the last look are those of the next one."""
        held_out = sum(batch.tokens_BT.numel() for batch in self._data.judge.batches)
        checks = int(self._state["checks"])
        is_spaced = self.tokens_done >= CHECK_SPACING * held_out * checks
        return is_spaced and self._share(num_steps) * CHECKS >= checks

    def _share(self, num_steps: int) -> float:
        """How much of the budget is used up, of that which runs out first."""
        shares = [self._state["step"] / num_steps]
        if self._settings.seconds:
            shares.append(self._state["seconds"] / self._settings.seconds)
        return float(max(shares))

    def _draws(self, num_steps: int) -> Iterator[torch.Tensor]:
        """Rows of each step that is left: every epoch in an order of its own."""
        num_rows, rows = len(self._rows), self._settings.rows
        for step in range(self._state["step"], num_steps):
            picked = []
            for i in range(step * rows, (step + 1) * rows):
                epoch, position = divmod(i, num_rows)
                generator = torch.Generator().manual_seed(self._seed * 1_000_003 + epoch)
                picked.append(torch.randperm(num_rows, generator=generator)[position])
            yield self._rows[torch.stack(picked)]

    def _step(self, rows_BT: torch.Tensor, share: float) -> None:
        share_of_rate = min(1.0, share / WARM_UP + 0.05) * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * share)))
        for group in self._optimizer.param_groups:
            group["lr"] = self._rate * share_of_rate
        self._optimizer.zero_grad(set_to_none=True)
        expected_BTD, hidden_BTD = self._teacher(rows_BT), self._student(rows_BT)
        leaf_BTD = hidden_BTD.detach().requires_grad_()
        for row in range(len(rows_BT)):  # layers take the rows together; the logits of one row at a time are in memory
            one = slice(row, row + 1)
            with torch.no_grad():
                logits_1TV = self._teacher.project(expected_BTD[one])
            loss = _divergence(logits_1TV, self._student.project(leaf_BTD[one])) / len(rows_BT)
            loss.backward()  # type: ignore[no-untyped-call]
        hidden_BTD.backward(leaf_BTD.grad)
        torch.nn.utils.clip_grad_norm_(self._trained.values(), 1.0)
        self._optimizer.step()

    def _check(self) -> None:
        """Look at the held-out loss, and remember the weights where it is the best so far."""
        self._state["checks"] += 1
        with torch.no_grad():
            rows = [row for batch in self._data.judge.batches for row in one_by_one(batch.tokens_BT)]
            loss = sum(
                float(_divergence(logits_of(self._teacher, row), logits_of(self._student, row))) for row in rows
            ) / len(rows)
        if not math.isfinite(loss):
            raise NotANumber("the held-out loss of healing", [])
        self._state["since_best"] += 1
        if loss < self._state["best"]:
            self._state |= {"best": loss, "since_best": 0}
            self._best = {name: weight.detach().clone() for name, weight in self._trained.items()}

    def _save(self) -> None:
        held = {
            "state": self._state,
            "weights": {name: weight.detach() for name, weight in self._trained.items()},
            "best": self._best,
            "optimizer": self._optimizer.state_dict(),
        }
        with replacing(self._checkpoint) as part:
            torch.save(held, part)

    def _load(self) -> None:
        if not self._checkpoint.is_file():
            return
        held = torch.load(self._checkpoint, weights_only=True, map_location="cpu")
        self._state, self._best = held["state"], held["best"]
        with torch.no_grad():
            for name, weight in self._trained.items():
                weight.copy_(held["weights"][name])
        self._optimizer.load_state_dict(held["optimizer"])


def one_by_one(tokens_BT: torch.Tensor) -> list[torch.Tensor]:
    """Rows [1, T]: the logits of one at a time are in memory."""
    return [tokens_BT[row : row + 1] for row in range(len(tokens_BT))]


def logits_of(model: Student | Teacher, tokens_BT: torch.Tensor) -> torch.Tensor:
    """[B, T, V]."""
    return model.project(model(tokens_BT))


def _divergence(expected_BTV: torch.Tensor, found_BTV: torch.Tensor) -> torch.Tensor:
    """KL divergence of the distributions of logits `found_BTV` from those expected, mean over positions, in nats."""
    expected_TV = torch.log_softmax(expected_BTV.flatten(0, 1), dim=-1)
    found_TV = torch.log_softmax(found_BTV.flatten(0, 1), dim=-1)
    return torch.nn.functional.kl_div(found_TV, expected_TV, reduction="batchmean", log_target=True)
