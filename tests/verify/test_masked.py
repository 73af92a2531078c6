from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from amoeba_export.errors import InputError
from amoeba_export.ir import SubnetPlan
from amoeba_export.materialize import materialize_subnet
from amoeba_export.verify import masked_logits
from tests.materialize.subnets import bare_plan, noise_adapter, open_supernet, plan_for, write
from tests.tiny import FAMILIES, VOCAB

IDS = torch.randint(0, VOCAB, (2, 9), generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_full_plan_is_the_source_model(tiny_dirs: dict[str, Path], family: str) -> None:
    supernet = open_supernet(tiny_dirs[family])
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(tiny_dirs[family])(IDS).logits
    torch.testing.assert_close(masked_logits(supernet, SubnetPlan.full(supernet.architecture), IDS), expected)


def test_masking_is_zeroing_columns_and_adding_their_mean(tiny_dirs: dict[str, Path]) -> None:
    """The same by hand in the stock model: zero columns of o and down, constants through biases."""
    supernet = open_supernet(tiny_dirs["llama"])
    plan = bare_plan(supernet)
    model = AutoModelForCausalLM.from_pretrained(tiny_dirs["llama"])
    assert supernet.strategy is not None and supernet.strategy.importance is not None
    importance, head_dim = supernet.strategy.importance, supernet.architecture.head_dim
    with torch.no_grad():
        for layer, kept in zip(model.model.layers, plan.layers, strict=True):
            channels = [head * head_dim + i for head in kept.query_heads for i in range(head_dim)]
            for linear, indices, means in (
                (layer.self_attn.o_proj, channels, importance.o_mean_LQ),
                (layer.mlp.down_proj, list(kept.ffn), importance.down_mean_LF),
            ):
                gone = torch.ones(linear.in_features)
                gone[indices] = 0
                bias = linear.weight @ (torch.from_numpy(means[kept.source_layer]) * gone)
                linear.weight *= 1 - gone
                linear.bias = torch.nn.Parameter(bias)
        expected = model(IDS).logits
    torch.testing.assert_close(masked_logits(supernet, plan, IDS), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "qwen2"])
@pytest.mark.parametrize("dora", [[False], [True], [False, True], [True, False, True]])
def test_unmerged_adapters_agree_with_merged_ones(
    tiny_dirs: dict[str, Path], tmp_path: Path, family: str, dora: list[bool]
) -> None:
    supernet = open_supernet(tiny_dirs[family])
    adapters = tuple(noise_adapter(supernet, dora=is_dora, seed=i) for i, is_dora in enumerate(dora))
    supernet = dataclasses.replace(supernet, adapters=adapters)
    plan = plan_for(supernet, "3x0.6")
    folder = write(materialize_subnet(supernet, plan), tmp_path / "out")
    with torch.no_grad():
        dense = AutoModelForCausalLM.from_pretrained(folder)(IDS).logits
    torch.testing.assert_close(masked_logits(supernet, plan, IDS), dense, rtol=1e-4, atol=1e-4)


def test_compensation_needs_a_strategy(tiny_dirs: dict[str, Path]) -> None:
    supernet = open_supernet(tiny_dirs["llama"])
    plan = plan_for(supernet, "3x0.6")
    with pytest.raises(InputError, match="no strategy is given"):
        masked_logits(dataclasses.replace(supernet, strategy=None), plan, IDS)
