"""One training step of the published code, reproduced: losses, logits, gate and every gradient."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from amoeba_export.finetune import objective
from amoeba_export.finetune.adapter import WEIGHTS, read_weights, saved_weights
from amoeba_export.finetune.model import SlicedSupernet
from amoeba_export.finetune.objective import Buffers, Positions, TrainingLoss
from amoeba_export.finetune.settings import LowRankSettings, MaskForm, ObjectiveSettings
from amoeba_export.finetune.smol import TrainedLowRank
from amoeba_export.ir import Shape, Supernet
from amoeba_export.ir.derive import CutRules, derive_plan
from amoeba_export.load import load_supernet
from amoeba_export.load.upstream import import_upstream

WIDTHS = (1.0, 7 / 8, 3 / 4, 5 / 8)


@pytest.fixture(scope="module")
def supernet() -> Supernet:
    folder = Path(__file__).parents[1] / "goldens" / "C"
    supernet = load_supernet(str(folder / "base"))
    strategy = import_upstream(folder / "readme_ratios" / "dp_selection_strategy.npy", supernet.architecture)
    return dataclasses.replace(supernet, strategy=strategy)


@pytest.fixture
def low_rank(supernet: Supernet, goldens: Path) -> TrainedLowRank:
    settings = LowRankSettings(rank=4, alpha=16, experts=5, top_k=2)
    low_rank = TrainedLowRank(supernet.family, supernet.architecture, settings, WIDTHS, generator=torch.Generator())
    read_weights(goldens / "C/readme_ratios/adapter" / WEIGHTS, low_rank)
    return low_rank


@pytest.mark.parametrize("kd", ["1", "0.3"])
def test_a_step_has_the_recorded_losses_logits_gates_and_gradients(
    supernet: Supernet, low_rank: TrainedLowRank, goldens: Path, kd: str
) -> None:
    recorded = np.load(goldens / f"C/readme_ratios/train_step_kd{kd}.npz")
    gradients = load_file(goldens / f"C/readme_ratios/train_step_kd{kd}_grads.safetensors")
    losses = run_step(supernet, low_rank, recorded, mask="unshifted")
    assert losses["balanced"] == pytest.approx(recorded["balanced"], abs=1e-5)
    assert losses["raw"] == pytest.approx(recorded["raw"], abs=1e-5)
    assert losses["ce"] == pytest.approx(recorded["ce"], abs=1e-5)
    assert losses["kd"][1:] == pytest.approx(recorded["kd"][1:], abs=1e-5)
    assert losses["logits"] <= 1e-4
    seen = set()
    for name, parameter, expert in saved_weights(low_rank):
        ours = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        ours = ours if expert is None else ours[expert]
        theirs = gradients.get(name)
        seen.add(name)
        assert (ours - (0 if theirs is None else theirs)).abs().max() <= 1e-5, name
    assert set(gradients) <= seen


def test_the_shifted_mask_distils_other_positions(supernet: Supernet, low_rank: TrainedLowRank, goldens: Path) -> None:
    """The published code weighs positions that *hold* a label; shifted, those that *predict* one count."""
    recorded = np.load(goldens / "C/readme_ratios/train_step_kd1.npz")
    labels_BT = torch.from_numpy(recorded["labels"])
    shifted, unshifted = Positions.of(labels_BT), Positions.of(labels_BT, "unshifted")
    assert torch.equal(shifted.select_BT[:, :-1], labels_BT[:, 1:] != -100)
    assert torch.equal(unshifted.select_BT, (labels_BT != -100) | shifted.select_BT)
    losses = run_step(supernet, low_rank, recorded, mask="shifted")
    assert losses["ce"] == pytest.approx(recorded["ce"], abs=1e-5)
    assert (np.abs(np.array(losses["kd"][1:]) - recorded["kd"][1:]) > 1e-3).all()


def run_step(
    supernet: Supernet, low_rank: TrainedLowRank, recorded: np.lib.npyio.NpzFile, *, mask: MaskForm
) -> dict[str, object]:
    """Forward and backward of the recorded shapes, in order. `logits` is the largest difference to the recorded."""
    assert supernet.strategy is not None
    model = SlicedSupernet(supernet)
    input_ids_BT, labels_BT = torch.from_numpy(recorded["input_ids"]), torch.from_numpy(recorded["labels"])
    positions = Positions.of(labels_BT, mask)
    settings = ObjectiveSettings(kd_weight=float(recorded["kd_weight"]), mask=mask)
    losses_of = TrainingLoss(
        settings, positions, model.head_VD, num_followers=len(recorded["active"]) - 1, buffers=Buffers()
    )
    low_rank.zero_grad()
    losses: dict[str, list[float]] = {"balanced": [], "raw": [], "ce": [], "kd": []}
    worst = 0.0
    for i, (active, width) in enumerate(zip(recorded["active"], recorded["width"], strict=True)):
        shape = Shape(int(active.sum()), float(width))
        plan = derive_plan(supernet.strategy, supernet.architecture, shape, CutRules(gate_widths=WIDTHS))
        assert plan.active_layers(6) == tuple(active)
        assert low_rank.gate is not None
        scores_K, experts_K = low_rank.gate(plan)
        assert experts_K.tolist() == recorded["gate_indices"][i].tolist()
        assert scores_K.tolist() == pytest.approx(recorded["gate_scores"][i][experts_K], abs=1e-6)
        given = {"cut": model.cut(plan), "low_rank": low_rank.at(plan), "select_BT": positions.select_BT}
        theirs_PV = torch.from_numpy(recorded["logits"][i])[positions.select_BT]
        worst = max(worst, (model.logits(model(input_ids_BT, **given)) - theirs_PV).abs().max().item())
        loss = losses_of(model(input_ids_BT, **given))
        loss.total.backward()
        losses["balanced"].append(loss.total.item())
        losses["raw"].append(loss.raw.item())
        losses["ce"].append(loss.cross_entropy.item())
        losses["kd"].append(float("nan") if loss.distillation is None else loss.distillation.item())
    return {**losses, "logits": worst}


@pytest.mark.parametrize(
    ("name", "masked", "temperature"),
    [("kl_nomask_T1", False, 1.0), ("kl_mask_T1", True, 1.0), ("kl_mask_T2", True, 2.0), ("kl_nomask_T3", False, 3.0)],
)
def test_the_soft_loss_and_its_gradient_are_the_recorded_ones(
    goldens: Path, monkeypatch: pytest.MonkeyPatch, name: str, masked: bool, temperature: float
) -> None:
    """With an identity for a head, hidden states are logits."""
    recorded = {key: torch.from_numpy(value) for key, value in np.load(goldens / "loss_kl.npz").items()}
    student_BTV = recorded["student"].requires_grad_()
    vocab_size = student_BTV.shape[-1]
    monkeypatch.setattr(objective, "PRODUCT_LOGITS", 5 * vocab_size)
    monkeypatch.setattr(objective, "PASS_LOGITS", 2 * vocab_size)
    select_BT = torch.ones(student_BTV.shape[:-1], dtype=torch.bool)
    counts_P = recorded["mask"].bool().flatten() if masked else select_BT.flatten()
    positions = Positions(select_BT, torch.zeros(counts_P.shape, dtype=torch.int64), counts_P)
    settings = ObjectiveSettings(temperature=temperature, balance=False)
    losses = TrainingLoss(settings, positions, torch.eye(vocab_size), num_followers=1, buffers=Buffers())
    losses(recorded["teacher"].flatten(0, -2))
    loss = losses(student_BTV.flatten(0, -2))
    loss.total.backward()
    assert loss.distillation is not None
    assert loss.distillation.item() == pytest.approx(float(recorded[name]), abs=1e-5)
    assert student_BTV.grad is not None
    assert (student_BTV.grad - recorded[f"{name}_grad"]).abs().max() <= 1e-5
