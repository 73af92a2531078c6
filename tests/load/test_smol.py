"""Mixtures of LoRAs, against what the published code recorded."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from amoeba_export.errors import DamagedFile, InputError, UnsupportedAdapter, WrongModel
from amoeba_export.ir import LayerPlan, Shape, SubnetPlan, Supernet
from amoeba_export.load import load_supernet
from amoeba_export.load.smol import SmolAdapter, parse_width_choice

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
RATIOS = ["C", "C/readme_ratios"]
Q0 = "model.layers.0.self_attn.q_proj"


def load(goldens: Path, adapter: Path) -> tuple[Supernet, SmolAdapter]:
    supernet = load_supernet(str(goldens / "C" / "base"), adapters=[adapter])
    (found,) = supernet.adapters
    assert isinstance(found, SmolAdapter)
    return supernet, found


def plan_of(active: tuple[int, ...], width: float, gate_width: float | None) -> SubnetPlan:
    layers = tuple(
        LayerPlan(source_layer=i, query_heads=(0,), kv_heads=(0,), ffn=(0,)) for i, keep in enumerate(active) if keep
    )
    return SubnetPlan(shape=Shape(len(layers), width), policy="uniform", layers=layers, gate_width=gate_width)


@pytest.fixture
def adapter(goldens: Path, tmp_path: Path) -> Path:
    """A copy of the recorded adapter that a test may damage."""
    return Path(shutil.copytree(goldens / "C" / "adapter", tmp_path / "adapter"))


def edit(folder: Path, **keys: Any) -> None:
    config = json.loads((folder / CONFIG).read_text()) | keys
    (folder / CONFIG).write_text(json.dumps(config))


def change(folder: Path, weights: dict[str, torch.Tensor | None]) -> None:
    kept = load_file(folder / WEIGHTS) | weights  # type: ignore[operator]
    save_file({name: weight for name, weight in kept.items() if weight is not None}, folder / WEIGHTS)


@pytest.mark.parametrize("ratios", RATIOS)
def test_the_gate_says_what_the_published_gate_said(goldens: Path, ratios: str):
    _, adapter = load(goldens, goldens / ratios / "adapter")
    recorded = np.load(goldens / ratios / "logits.npz")
    assert len(recorded["width"]) == 16
    for active, width, scores, indices in zip(
        recorded["active_layers"], recorded["width"], recorded["gate_scores"], recorded["gate_indices"], strict=True
    ):
        gate = adapter.gate(tuple(active), float(width))
        assert gate.indices == tuple(indices)
        assert np.abs(gate.scores_E.numpy() - scores).max() < 1e-6
        assert adapter.gate_for(plan_of(tuple(active), 0.33, float(width))) is gate
        assert adapter.gate_for(plan_of(tuple(active), float(width), None)) is gate


@pytest.mark.parametrize("ratios", RATIOS)
def test_the_gate_enters_twice(goldens: Path, ratios: str):
    """W' - W = (alpha / r) (sum g B)(sum g A), from the recorded gate and the weights as they lie in the file."""
    _, adapter = load(goldens, goldens / ratios / "adapter")
    weights = load_file(goldens / ratios / "adapter" / WEIGHTS)
    recorded = np.load(goldens / ratios / "logits.npz")
    for shape in (0, 7, 15):
        plan = plan_of(tuple(recorded["active_layers"][shape]), float(recorded["width"][shape]), None)
        scores = torch.from_numpy(recorded["gate_scores"][shape])
        for module in (Q0, "model.layers.5.mlp.down_proj"):
            delta = adapter.delta(module, plan)
            assert delta is not None and delta.magnitude_O is None
            assert delta.scale == 16.0 / 4
            for kind, ours in (("lora_A", delta.a_RI), ("lora_B", delta.b_OR)):
                mixed = sum(scores[e] * weights[f"base_model.model.{module}.{kind}.{e}.weight"] for e in range(5))
                torch.testing.assert_close(ours, mixed, atol=1e-6, rtol=1e-5)


def test_a_pickled_adapter_is_the_same_adapter(goldens: Path, adapter: Path, tmp_path: Path):
    pickled = Path(shutil.copytree(adapter, tmp_path / "pickled"))
    torch.save(load_file(pickled / WEIGHTS), pickled / "adapter_model.bin")
    (pickled / WEIGHTS).unlink()
    supernet, first = load(goldens, adapter)
    _, second = load(goldens, pickled)
    plan = SubnetPlan.full(supernet.architecture)
    assert torch.equal(first.gate_for(plan).scores_E, second.gate_for(plan).scores_E)
    for module in first.modules():
        a, b = first.delta(module, plan), second.delta(module, plan)
        assert a is not None and b is not None
        assert torch.equal(a.a_RI, b.a_RI) and torch.equal(a.b_OR, b.b_OR) and a.scale == b.scale


def test_it_changes_every_linear_layer_but_the_head(goldens: Path):
    supernet, adapter = load(goldens, goldens / "C" / "adapter")
    linears = {name.removesuffix(".weight") for name in supernet.tensors.names() if "_proj" in name}
    assert set(adapter.modules()) == linears
    assert adapter.delta("lm_head", SubnetPlan.full(supernet.architecture)) is None


def test_a_width_that_the_gate_does_not_know(goldens: Path):
    _, adapter = load(goldens, goldens / "C" / "adapter")
    with pytest.raises(InputError) as caught:
        adapter.gate((1,) * 6, 0.75)
    assert str(caught.value) == (
        "The adapter's gate does not know width 0.75.\n  where: adapter\n  next:  Choose one of: 1, 0.8, 0.65, 0.5."
    )


@pytest.mark.parametrize(
    ("value", "choices"),
    [
        ("[1,7/8,3/4,5/8]", (1.0, 0.875, 0.75, 0.625)),
        (" [1, 0.8, 0.65 ]", (1.0, 0.8, 0.65)),
        ("1,1/2", (1.0, 0.5)),
        ([1, 0.5], (1.0, 0.5)),
    ],
)
def test_width_choices_are_parsed(value: Any, choices: tuple[float, ...]):
    assert parse_width_choice(value, where=Path("c")) == choices


@pytest.mark.parametrize("value", ["__import__('os').getcwd()", "[1,,2]", "[]", "[1/0]", "[1,2]", "[1,1.0]", None, 3])
def test_what_is_no_list_of_widths_is_refused(value: Any):
    with pytest.raises(DamagedFile, match="its width_choice is not a list of"):
        parse_width_choice(value, where=Path("c"))


def test_an_adapter_for_a_model_with_other_layers(goldens: Path, adapter: Path):
    edit(adapter, width_choice="[1,0.8,0.65]")
    with pytest.raises(WrongModel) as caught:
        load(goldens, adapter)
    assert caught.value.what == (
        "The adapter was made for another model: its gate knows 7 layers and 3 widths, this model has 6 layers."
    )


def test_an_adapter_for_another_model(adapter: Path, tiny_dirs: dict[str, Path]):
    with pytest.raises(WrongModel, match=r"it changes model\.layers\.4\.mlp\.down_proj, which this"):
        load_supernet(str(tiny_dirs["llama"]), adapters=[adapter])


@pytest.mark.parametrize(
    ("keys", "reason"),
    [
        ({"top_k": 6}, "its config takes the top 6 of 5 experts"),
        ({"num_experts": 4}, "does not have an A and a B for each of 4 experts"),
        ({"num_experts": "five"}, "its config has num_experts = 'five'"),
        ({"width_choice": None}, "its width_choice is not a list of fractions: None"),
    ],
)
def test_a_config_that_makes_no_sense(goldens: Path, adapter: Path, keys: dict[str, Any], reason: str):
    edit(adapter, **keys)
    with pytest.raises(DamagedFile) as caught:
        load(goldens, adapter)
    assert reason in caught.value.what


def test_a_gate_that_is_not_all_there(goldens: Path, adapter: Path):
    change(adapter, {"base_model.lora_sparsemoe.router.topkroute_linear.1.bias": None})
    with pytest.raises(DamagedFile, match=r"the gate is not complete: .*topkroute_linear\.1\.bias is missing"):
        load(goldens, adapter)


def test_the_noise_is_not_needed(goldens: Path, adapter: Path):
    name = "base_model.lora_sparsemoe.router.noise_linear"
    change(adapter, {f"{name}.weight": None, f"{name}.bias": None})
    load(goldens, adapter)


def test_experts_of_another_rank(goldens: Path, adapter: Path):
    edit(adapter, r=8)
    with pytest.raises(WrongModel, match=r"lora_A\.0\.weight has shape \[4, 192\], this model needs \[8, 192\]"):
        load(goldens, adapter)


@pytest.mark.parametrize("keys", [{"use_dora": True}, {"alpha_pattern": {"q_proj": 3}}])
def test_options_that_a_mixture_cannot_have(goldens: Path, adapter: Path, keys: dict[str, Any]):
    edit(adapter, **keys)
    with pytest.raises(UnsupportedAdapter, match=f"{next(iter(keys))} together with a mixture of LoRAs"):
        load(goldens, adapter)
