"""Weights outside the layers, as a refit left them."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch

from amoeba_export.ir.refit import Refit
from amoeba_export.load import load_supernet
from amoeba_export.model.merged import RefittedTensors
from tests.tiny import save_tiny


@dataclasses.dataclass
class Held:
    """Weights in memory."""

    weights: dict[str, torch.Tensor]

    def names(self) -> list[str]:
        return list(self.weights)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.weights[name].shape)

    def dtype(self, name: str) -> torch.dtype:
        return self.weights[name].dtype

    def read(self, name: str) -> torch.Tensor:
        return self.weights[name]


def test_only_what_lies_outside_the_layers_is_the_refits(tmp_path: Path) -> None:
    """A layer of a cut has another number than in the model."""
    supernet = load_supernet(str(save_tiny(tmp_path / "model")))
    norm, q = supernet.family.weight("final_norm"), supernet.family.weight("q", 0)
    held = Held({norm: torch.full((96,), 7.0), q: torch.zeros(1, 1)})
    plan = supernet.full_plan()
    refit = Refit(tensors=held, geometry=plan.geometry, model_id=supernet.identity, identity="ab" * 32)
    refitted = dataclasses.replace(supernet, refits={refit.identity: refit})
    tensors = RefittedTensors(supernet.tensors, refitted, dataclasses.replace(plan, refit_id=refit.identity))
    torch.testing.assert_close(tensors.read(norm), held.read(norm), rtol=0, atol=0)
    torch.testing.assert_close(tensors.read(q), supernet.tensors.read(q), rtol=0, atol=0)
    plain = RefittedTensors(supernet.tensors, supernet, plan)
    torch.testing.assert_close(plain.read(norm), supernet.tensors.read(norm), rtol=0, atol=0)
