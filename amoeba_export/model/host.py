"""Where a long run works: what calibration, refits and rounding ask of the machine, besides what they compute."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from amoeba_export.ir import SILENT, Progress

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True, kw_only=True)
class Host:
    """One machine at work.

    Attributes:
        cache_dir: Finished work is kept below it, so that a run that was stopped goes on; None: nothing is kept.
        device: Where layers run; None takes a GPU when there is one.
        progress: Told of everything that takes time.
    """

    cache_dir: Path | None = None
    device: torch.device | None = None
    progress: Progress = SILENT

    @property
    def chosen_device(self) -> torch.device:
        """Where layers run."""
        import torch

        return self.device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
