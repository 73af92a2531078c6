"""The steps of a fine-tuning run, as one process does its share of them.

Several processes each take rows of their own and the *same* shapes, and average their gradients once per step. That is
what DDP does; its own hooks need every backward pass to touch the same weights, which no sandwich does.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from amoeba_export.finetune.checkpoint import Run
from amoeba_export.finetune.data import read_examples
from amoeba_export.finetune.model import SlicedSupernet
from amoeba_export.finetune.packing import Batches
from amoeba_export.finetune.sampling import ShapeSampler
from amoeba_export.finetune.settings import Settings
from amoeba_export.finetune.smol import TrainedLowRank
from amoeba_export.finetune.step import GateNoise, Losses, SandwichStep, noise_scale, rate_schedule
from amoeba_export.ir import SILENT, Progress, Supernet
from amoeba_export.ir.derive import CutRules, derive_plan
from amoeba_export.ir.dtype import DTYPES
from amoeba_export.model.tokenizer import open_tokenizer


class Loop:
    """One process's share of a run: everything in memory, and the loop."""

    def __init__(
        self,
        supernet: Supernet,
        settings: Settings,
        sampler: ShapeSampler,
        data: Path,
        accelerator: Accelerator,
        progress: Progress,
    ) -> None:
        assert supernet.strategy is not None
        self.settings, self.sampler, self.accelerator = settings, sampler, accelerator
        self.progress = progress if accelerator.is_main_process else SILENT
        gate_widths = settings.gate_widths if settings.low_rank.mode == "smol" else ()
        rules = CutRules(policy=settings.policy, gate_widths=tuple(gate_widths))
        plans = {
            known: derive_plan(supernet.strategy, supernet.architecture, known, rules) for known in sampler.shapes()
        }
        self.progress.note(f"Reading {data} and the model.")
        examples = read_examples(
            data,
            open_tokenizer(supernet.folder),
            max_length=settings.max_length,
            prompt=settings.prompt,
            progress=self.progress,
        )
        self.batches = Batches(
            examples,
            batch_size=settings.batch_size,
            max_length=settings.max_length,
            packing=settings.packing,
            seed=settings.seed,
        )
        self.low_rank = TrainedLowRank(
            supernet.family,
            supernet.architecture,
            settings.low_rank,
            settings.gate_widths,
            generator=torch.Generator().manual_seed(settings.seed),
        ).to(accelerator.device)
        model = SlicedSupernet(
            supernet,
            dtype=DTYPES[settings.dtype].torch_dtype,
            device=accelerator.device,
            checkpoint_layers=settings.gradient_checkpointing,
        )
        self.step = SandwichStep(
            model, self.low_rank, plans, settings.objective, loss_scale=1 / settings.gradient_accumulation
        )
        self.parameters = dict(self.low_rank.named_parameters())
        self.optimizer = torch.optim.AdamW(
            self.parameters.values(), lr=settings.learning_rate, weight_decay=settings.weight_decay
        )
        self.schedule = rate_schedule(settings, self.optimizer)
        self.progress.note(
            f"Training {sum(p.numel() for p in self.parameters.values()):,} weights of {settings.low_rank.mode} on "
            f"{len(examples):,} examples: {settings.max_steps} steps of {len(sampler.sample(0))} subnets, shapes "
            f"{sampler.shapes()[0]} to {sampler.shapes()[-1]}, on {accelerator.num_processes} x {accelerator.device}."
        )

    def train(self, run: Run) -> list[dict[str, Any]]:
        """Run what is left of the steps; return the log of all of them."""
        main = self.accelerator.is_main_process
        start = run.last_step()
        if start:
            run.load(start, self.parameters, self.optimizer)
            self.progress.note(f"Going on after step {start}.")
        records = run.rewind_log(start) if main else []
        max_steps = self.settings.max_steps
        with self.progress.track("Fine-tuning", max_steps) as advance:
            advance(start)
            for step in range(start, max_steps):
                record = self.optimizer_step(step)
                if main:
                    run.log(record)
                    records.append(record)
                    if (step + 1) % self.settings.save_every == 0 and step + 1 < max_steps:
                        run.save(step + 1, self.parameters, self.optimizer)
                advance(1)
        return records

    def optimizer_step(self, step: int) -> dict[str, Any]:
        """All micro-batches of one step, and the update. Returns the step's line of the log."""
        settings, world = self.settings, self.accelerator.num_processes
        began = time.perf_counter()
        scale = noise_scale(step, settings.max_steps, settings.low_rank.gate_warmup)
        losses: Losses = []
        tokens = 0
        for micro in range(settings.gradient_accumulation):
            index = (step * settings.gradient_accumulation + micro) * world + self.accelerator.process_index
            batch = self.batches.at(index)
            tokens += batch.num_tokens
            key = (settings.seed, step, micro)
            noise = GateNoise(key, settings.low_rank.experts, scale) if scale else None
            shapes = self.sampler.sample(step, micro)
            losses += self.step.run(batch.to(self.accelerator.device), shapes, noise=noise)
        self._average_gradients()
        grad_norm = torch.nn.utils.clip_grad_norm_(
            self.parameters.values(), settings.max_grad_norm if settings.max_grad_norm else float("inf")
        )
        rate = settings.learning_rate * self.schedule(step + 1)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self.optimizer.zero_grad()
        losses, tokens = self._over_processes(losses, tokens)
        return {
            "step": step + 1,
            "epoch": self.batches.epoch_of((step * settings.gradient_accumulation) * world),
            "learning_rate": rate,
            "grad_norm": grad_norm.item(),
            "tokens": tokens,
            "seconds": round(time.perf_counter() - began, 3),
            "subnets": [{"shape": str(shape), **entry} for shape, entry in losses],
        }

    def _average_gradients(self) -> None:
        """Mean over processes, in one message. A weight that no subnet of the step used has the gradient zero."""
        parameters = list(self.parameters.values())
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        if self.accelerator.num_processes == 1:
            return
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        flat = self.accelerator.reduce(flat, reduction="mean")
        for gradient, mean in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(mean.view_as(gradient))

    def _over_processes(self, losses: Losses, tokens: int) -> tuple[Losses, int]:
        """Losses averaged and tokens summed over processes, which all drew the same shapes."""
        if self.accelerator.num_processes == 1:
            return losses, tokens
        values = [value for _, entry in losses for value in entry.values()]
        reduced = torch.tensor([*values, float(tokens)], dtype=torch.float64, device=self.accelerator.device)
        means = (self.accelerator.reduce(reduced, reduction="sum") / self.accelerator.num_processes).tolist()
        numbers = iter(means)
        averaged = [(shape, {key: next(numbers) for key in entry}) for shape, entry in losses]
        return averaged, round(next(numbers) * self.accelerator.num_processes)
