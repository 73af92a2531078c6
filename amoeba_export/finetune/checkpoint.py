"""An unfinished run on disk: its log, its checkpoints, and the adapter that it will become.

    OUT.training/
        run.json                 what the run was started with
        training.jsonl           one line per step
        checkpoints/step-000100/ adapter.safetensors, optimizer.safetensors; there only when complete
    OUT                          appears in one rename, when the run is done

Shapes, gate noise and batches are functions of the seed and the step (`sampling.py`, `step.py`, `packing.py`), so a
checkpoint holds weights, optimizer moments and a step number, and no state of any random generator.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from amoeba_export import leftovers
from amoeba_export.errors import InputError, NotReplaceable, OutputExists, UsageError
from amoeba_export.finetune.adapter import CONFIG
from amoeba_export.reading import as_json
from amoeba_export.replacing import replace_text

KEPT = 2
"""Checkpoints that stay. The last but one is for the case that a disk loses the last."""

LOG = "training.jsonl"


class Run:
    """The folder of an unfinished run.

    Args:
        out: The adapter folder to be.
        facts: What the result depends on, as JSON values. A resumed run must have the same.
        resume: Go on with an unfinished run if there is one.
        force: Replace what is at `out`, and start an unfinished run over.

    Raises:
        OutputExists: `out` is there and `force` is not set.
        NotReplaceable: `out` is there and is not an adapter folder.
        UsageError: An unfinished run is there and neither `resume` nor `force` is set, or its facts differ.
    """

    def __init__(self, out: Path, facts: Mapping[str, Any], *, resume: bool, force: bool) -> None:
        self._place(out)
        if out.exists():
            if not force:
                raise OutputExists(out)
            if not (out / CONFIG).is_file() and not (out.is_dir() and not any(out.iterdir())):
                raise NotReplaceable(out)
        facts = as_json(facts)
        if self.folder.exists() and not resume:
            if not force:
                raise UsageError(
                    f"An unfinished run is at '{self.folder}'.",
                    next_step="Go on with it with --resume, or start over with --force.",
                )
            shutil.rmtree(self.folder)
        self._noted = leftovers.note(self.give_up)
        if (self.folder / "run.json").is_file():
            self._check_facts(facts)
        else:
            self._checkpoints.mkdir(parents=True, exist_ok=True)
            replace_text(self.folder / "run.json", json.dumps(facts, indent=2) + "\n")

    @classmethod
    def joined(cls, out: Path) -> Run:
        """The run that the main process has opened, for the other processes: to load from, never to write."""
        run = cls.__new__(cls)
        run._place(out)
        return run

    def _place(self, out: Path) -> None:
        self.out = out
        self.folder = out.with_name(out.name + ".training")
        self.log_file = self.folder / LOG
        self._checkpoints = self.folder / "checkpoints"

    def _check_facts(self, facts: Mapping[str, Any]) -> None:
        before = json.loads((self.folder / "run.json").read_text(encoding="utf-8"))
        old, new = _flat(before), _flat(facts)
        changed = [f"{key} was {old.get(key)}, is {new.get(key)}" for key in old | new if old.get(key) != new.get(key)]
        if changed:
            raise UsageError(
                f"The unfinished run at '{self.folder}' was started differently: {'; '.join(changed)}.",
                next_step="Give what it was started with, or start over with --force.",
            )

    def last_step(self) -> int:
        """Steps done at the last checkpoint; 0 without one."""
        return max((int(folder.name.removeprefix("step-")) for folder in self._complete()), default=0)

    def load(self, step: int, parameters: Mapping[str, torch.nn.Parameter], optimizer: torch.optim.Optimizer) -> None:
        """Put weights and moments back as they were after `step` steps.

        Raises:
            InputError: The checkpoint does not hold these weights.
        """
        folder = self._checkpoints / _name(step)
        weights, moments = load_file(folder / "adapter.safetensors"), load_file(folder / "optimizer.safetensors")
        if set(weights) != set(parameters):
            raise InputError("The checkpoint holds other weights.", where=folder, next_step="Start over with --force.")
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(weights[name])
        for name, parameter in parameters.items():
            prefix = f"{name}:"
            optimizer.state[parameter] = {
                # AdamW keeps its step counter on the CPU whatever the weights are on
                key.removeprefix(prefix): value if key.endswith(":step") else value.to(parameter.device)
                for key, value in moments.items()
                if key.startswith(prefix)
            }

    def save(self, step: int, parameters: Mapping[str, torch.nn.Parameter], optimizer: torch.optim.Optimizer) -> None:
        """Write the checkpoint after `step` steps. It appears complete, or not at all."""
        staged = self._checkpoints / ".staged"
        shutil.rmtree(staged, ignore_errors=True)
        staged.mkdir()
        save_file(
            {name: p.detach().cpu().contiguous() for name, p in parameters.items()}, staged / "adapter.safetensors"
        )
        moments = {
            f"{name}:{key}": value.detach().cpu().contiguous()
            for name, parameter in parameters.items()
            for key, value in optimizer.state[parameter].items()
        }
        save_file(moments, staged / "optimizer.safetensors")
        _move(staged, self._checkpoints / _name(step))
        for folder in sorted(self._complete())[:-KEPT]:
            shutil.rmtree(folder)

    def log(self, record: Mapping[str, Any]) -> None:
        """Add one line to the training log."""
        with self.log_file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")

    def rewind_log(self, step: int) -> list[dict[str, Any]]:
        """Drop the lines after `step`, and a line that was cut off; return those that stay."""
        lines = self.log_file.read_text(encoding="utf-8").splitlines(keepends=True) if self.log_file.exists() else []
        records = [json.loads(line) for line in lines if line.endswith("\n")]
        kept = [record for record in records if record["step"] <= step]
        replace_text(self.log_file, "".join(json.dumps(record) + "\n" for record in kept))
        return kept

    def publish(self, fill: Callable[[Path], None]) -> None:
        """Build the adapter folder with `fill`, move it to `out` in one rename, and remove the run."""
        staged = self.folder / "adapter"
        shutil.rmtree(staged, ignore_errors=True)
        staged.mkdir()
        fill(staged)
        shutil.copyfile(self.log_file, staged / LOG)
        if self.out.exists():
            self.out.replace(self.folder / "replaced")
        _move(staged, self.out)
        shutil.rmtree(self.folder)
        leftovers.forget(self._noted)

    def give_up(self) -> None:
        """Leave an unfinished run: its checkpoints stay, to go on from. Without one, nothing of it stays."""
        leftovers.forget(self._noted)
        if not self.last_step():
            leftovers.remove_folder(self.folder)
        for half_written in (self._checkpoints / ".staged", self.folder / "adapter"):
            shutil.rmtree(half_written, ignore_errors=True)

    def _complete(self) -> list[Path]:
        return list(self._checkpoints.glob("step-*"))


def _move(staged: Path, place: Path) -> None:
    """Flush every file, then rename."""
    for file in [*staged.iterdir(), staged]:
        descriptor = os.open(file, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    staged.replace(place)


def _name(step: int) -> str:
    return f"step-{step:06d}"


def _flat(facts: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in facts.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat
