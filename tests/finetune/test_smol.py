from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from amoeba_export.errors import DamagedFile, NotFound, WrongModel
from amoeba_export.finetune.adapter import WEIGHTS, read_weights, write_adapter
from amoeba_export.finetune.settings import LowRankSettings
from amoeba_export.finetune.smol import TrainedLowRank
from amoeba_export.finetune.step import GateNoise
from amoeba_export.ir import Architecture, Shape, SubnetPlan
from amoeba_export.load import load_supernet
from amoeba_export.load.family_file import read_family
from tests.finetune.test_model import randomised

WIDTHS = (1.0, 0.5)
SETTINGS = LowRankSettings(rank=2, alpha=6.0, experts=4, top_k=2, targets=("q_proj", "down_proj"))


@pytest.fixture
def architecture(tiny_dirs: dict[str, Path]) -> Architecture:
    return load_supernet(str(tiny_dirs["llama"])).architecture


def trained(architecture: Architecture, settings: LowRankSettings = SETTINGS, seed: int = 0) -> TrainedLowRank:
    family = read_family(architecture.family).family
    return TrainedLowRank(family, architecture, settings, WIDTHS, generator=torch.Generator().manual_seed(seed))


def plan_of(architecture: Architecture, depth: int, width: float) -> SubnetPlan:
    full = SubnetPlan.full(architecture)
    return dataclasses.replace(full, shape=Shape(depth, width), layers=full.layers[:depth], gate_width=width)


def test_it_starts_as_no_change_and_as_its_seed_says(architecture: Architecture) -> None:
    first, again, other = trained(architecture), trained(architecture), trained(architecture, seed=1)
    pair = first.at(plan_of(architecture, 4, 1.0))("model.layers.0.self_attn.q_proj")
    assert pair is not None
    assert pair[0].abs().max() > 0
    assert pair[1].abs().max() == 0
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(first.parameters(), other.parameters(), strict=True))


def test_a_mixture_is_what_the_formula_says(architecture: Architecture) -> None:
    """(alpha / r) (sum g_e B_e) (sum g_e A_e): the gate enters twice."""
    low_rank = randomised(trained(architecture))
    module = "model.layers.1.mlp.down_proj"
    plan = plan_of(architecture, 3, 0.5)
    gate = low_rank.gate
    assert gate is not None
    inputs = torch.tensor([1.0, 1, 1, 0, 0, 1])  # layers kept; one-hot of the width choice
    first, second = gate.topkroute_linear
    logits = second.weight @ (first.weight @ inputs + first.bias) + second.bias
    chosen = logits.argsort(descending=True)[:2]
    scores = torch.zeros(4)
    scores[chosen] = torch.softmax(logits[chosen], dim=0)
    a_RI = sum(scores[e] * low_rank.a_of(module)[e] for e in range(4))
    b_OR = sum(scores[e] * low_rank.b_of(module)[e] for e in range(4))
    pair = low_rank.at(plan)(module)
    assert pair is not None
    assert torch.allclose(pair[1] @ pair[0], 6.0 / 2 * b_OR @ a_RI, atol=1e-6)
    assert low_rank.at(plan)("model.layers.1.mlp.up_proj") is None


def test_noise_is_softplus_scaled_and_repeatable(architecture: Architecture) -> None:
    low_rank = trained(architecture)
    plan, gate = plan_of(architecture, 3, 0.5), low_rank.gate
    assert gate is not None
    noise_E = GateNoise((7, 3, 0), 4, 0.5).draw(1)
    assert torch.equal(noise_E, GateNoise((7, 3, 0), 4, 0.5).draw(1))
    assert not torch.equal(noise_E, GateNoise((7, 3, 0), 4, 0.5).draw(2))
    assert torch.allclose(noise_E, GateNoise((7, 3, 0), 4, 1.0).draw(1) / 2)
    inputs = torch.tensor([1.0, 1, 1, 0, 0, 1])
    clean = gate.topkroute_linear(inputs)
    noisy = clean + noise_E * torch.nn.functional.softplus(gate.noise_linear(inputs))
    scores_K, experts_K = gate(plan, noise_E)
    assert experts_K.tolist() == noisy.topk(2).indices.tolist()
    assert torch.allclose(scores_K, noisy.topk(2).values.softmax(0))


def test_gradients_reach_the_chosen_experts_and_the_gate(architecture: Architecture) -> None:
    low_rank = randomised(trained(architecture))
    plan, module = plan_of(architecture, 3, 0.5), "model.layers.0.self_attn.q_proj"
    pair = low_rank.at(plan)(module)
    assert pair is not None and low_rank.gate is not None
    (pair[1] @ pair[0]).square().sum().backward()
    chosen = set(low_rank.gate(plan)[1].tolist())
    gradient = low_rank.a_of(module).grad
    assert gradient is not None
    assert {e for e in range(4) if gradient[e].abs().max() > 0} == chosen
    assert low_rank.gate.topkroute_linear[0].weight.grad is not None


def test_a_file_of_other_settings_is_refused(architecture: Architecture, tmp_path: Path) -> None:
    write_adapter(tmp_path, trained(architecture), base_model="tiny")
    narrow = dataclasses.replace(SETTINGS, rank=1, experts=3)
    with pytest.raises(WrongModel) as caught:
        read_weights(tmp_path / WEIGHTS, trained(architecture, narrow))
    assert "lora_A.0.weight is (2, 96), expected (1, 96)" in caught.value.what
    assert "lora_B.3.weight is not expected" in caught.value.what
    with pytest.raises(NotFound):
        read_weights(tmp_path / "absent", trained(architecture))
    (tmp_path / WEIGHTS).write_bytes(b"not weights")
    with pytest.raises(DamagedFile):
        read_weights(tmp_path / WEIGHTS, trained(architecture))
