"""One line per family and variant: what every engine and container makes of it is what transformers makes."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from amoeba_export.finetune.model import SlicedSupernet
from amoeba_export.formats import FORMATS
from amoeba_export.ir import Role, SubnetPlan, Supernet
from amoeba_export.ir.family import LINEARS, WRITERS
from amoeba_export.materialize import materialize_subnet
from amoeba_export.model.layers import LayerStack
from amoeba_export.model.opening import register_amoeba
from amoeba_export.verify import masked_logits
from amoeba_export.verify.expected import ExpectedWeights
from amoeba_export.verify.onnx_file import OpenedOnnx
from amoeba_export.verify.stored import STORED
from amoeba_export.verify.weights import check_weights
from tests.families.configs import FAMILIES, VARIANTS, save_families
from tests.materialize.subnets import bare_plan, open_supernet, plan_for, write
from tests.tiny import VOCAB

NAMES = (*FAMILIES, *VARIANTS)
IDS = torch.randint(0, VOCAB, (2, 12), generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return save_families(tmp_path_factory.mktemp("families"), NAMES)


@pytest.fixture(params=NAMES)
def supernet(request: pytest.FixtureRequest, folders: dict[str, Path]) -> Supernet:
    return open_supernet(folders[request.param])


def assert_same(found: torch.Tensor, expected: torch.Tensor) -> None:
    """Within 1e-4 of the largest logit."""
    assert found.shape == expected.shape
    assert float((found - expected).abs().max()) <= 1e-4 * float(expected.abs().max())


def cuts(supernet: Supernet) -> dict[str, SubnetPlan]:
    """Of depth, of a uniform width, of widths that differ, with blocks that are gone; with and without compensation."""
    uniform = plan_for(supernet, "3x0.6")
    return {
        "depth": plan_for(supernet, "3x1"),
        "uniform": uniform,
        "uniform, no bias": dataclasses.replace(uniform, compensate=False),
        "adaptive": plan_for(supernet, "3x0.5", "adaptive"),
        "bare": bare_plan(supernet),
    }


@torch.no_grad()
def stock(folder: Path) -> torch.Tensor:
    register_amoeba()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    logits: torch.Tensor = model(IDS, use_cache=False).logits
    return logits


_MASKED: dict[tuple[Path, str], torch.Tensor] = {}
"""By model and cut: every engine and container is compared with the same."""


def masked(supernet: Supernet, name: str, plan: SubnetPlan) -> torch.Tensor:
    """What the masked supernet says of the cut called `name`."""
    key = supernet.folder, name
    if key not in _MASKED:
        _MASKED[key] = masked_logits(supernet, plan, IDS)
    return _MASKED[key]


@torch.no_grad()
def test_the_whole_model_masked_is_that_of_transformers(supernet: Supernet) -> None:
    assert_same(masked(supernet, "full", supernet.full_plan()), stock(supernet.folder))


@torch.no_grad()
def test_layers_of_ours_in_a_row_are_the_model(supernet: Supernet) -> None:
    stack = LayerStack(supernet, memory_bytes=10**9)
    hidden_BTD = stack.embed(IDS)
    for layer_idx in range(supernet.architecture.num_layers):
        hidden_BTD = stack.run(stack.layer(layer_idx), hidden_BTD)
    head = stack.weight(stack.head_name())
    assert_same(stack.logits(stack.norm(hidden_BTD) @ head.T), stock(supernet.folder))


@torch.no_grad()
def test_what_reads_a_norm_does_not_see_the_size_of_the_stream(supernet: Supernet) -> None:
    stack = LayerStack(supernet, memory_bytes=10**9)
    layer, hidden_BTD = stack.layer(0), stack.embed(IDS)
    entered: dict[Role, list[torch.Tensor]] = {role: [] for role in LINEARS}
    for role, seen in entered.items():
        linear = layer.role(role)
        assert linear is not None
        linear.register_forward_pre_hook(lambda _, x, seen=seen: seen.append(x[0]))
    for size, writer in itertools.product((1, 16), WRITERS):
        stack.block(layer, writer, size * hidden_BTD)
    for role, seen in entered.items():
        if role in WRITERS:
            assert not layer.reads_norm(role)
        elif seen:  # experts are not called as one matrix
            small, large = seen
            changed = float((large - small).norm() / small.norm())
            assert changed < 0.02 if layer.reads_norm(role) else changed > 10, role


@torch.no_grad()
@pytest.mark.parametrize("name", ["depth", "uniform", "adaptive", "bare"])
def test_cuts_that_are_calibrated_and_trained_are_the_masked_model(supernet: Supernet, name: str) -> None:
    plan = cuts(supernet)[name]
    expected = masked(supernet, name, plan)
    running = SlicedSupernet(supernet)
    every = torch.ones_like(IDS, dtype=torch.bool)
    x_PD = running(IDS, cut=running.cut(plan), select_BT=every)
    assert_same(running.logits(x_PD).view_as(expected), expected)
    assert supernet.strategy is not None and supernet.strategy.importance is not None
    stack = LayerStack(supernet, memory_bytes=10**9)
    hidden_BTD = stack.embed(IDS)
    for layer in plan.layers:
        module = stack.cut_layer(layer, supernet.strategy.importance, compensation=plan.compensation)
        hidden_BTD = stack.run(module, hidden_BTD)
    assert_same(stack.logits(stack.norm(hidden_BTD) @ stack.weight(stack.head_name()).T), expected)


@pytest.mark.parametrize("name", ["full", "depth", "uniform", "uniform, no bias", "adaptive", "bare"])
def test_safetensors_are_the_masked_model(supernet: Supernet, name: str, tmp_path: Path) -> None:
    plan = supernet.full_plan() if name == "full" else cuts(supernet)[name]
    folder = write(materialize_subnet(supernet, plan), tmp_path / "out")
    assert_same(stock(folder), masked(supernet, name, plan))
    expected = ExpectedWeights(supernet, plan)
    check_weights(folder, STORED["safetensors"](folder, expected.wanted), expected)


@pytest.mark.parametrize("dialect", ["ort", "standard"])
@pytest.mark.parametrize("name", ["full", "uniform", "bare"])
def test_onnx_is_the_masked_model(supernet: Supernet, name: str, dialect: str, tmp_path: Path) -> None:
    plan = supernet.full_plan() if name == "full" else cuts(supernet)[name]
    subnet = materialize_subnet(supernet, plan)
    writer = FORMATS["onnx"].open_writer(subnet, tmp_path, dtype="fp32", dialect=dialect)
    for weight_name, weight in subnet.stream():
        writer.accept(weight_name, weight)
    writer.close()
    opened = OpenedOnnx(tmp_path)
    found = torch.cat([opened.logits(IDS[i : i + 1]) for i in range(len(IDS))])
    assert_same(found, masked(supernet, name, plan))
