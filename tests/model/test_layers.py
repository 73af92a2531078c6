"""A layer that we run on its own computes what it computes inside transformers' model."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from amoeba_export.ir import Importance, LayerPlan, Supernet
from amoeba_export.model.layers import LayerStack
from tests.model.models import tiny_supernet, whole_model
from tests.tiny import FAMILIES, VOCAB

RESIDENT = 10**9
TOKENS_BT = torch.randint(0, VOCAB, (2, 11), generator=torch.Generator().manual_seed(1))


def through(stack: LayerStack, tokens_BT: torch.Tensor) -> torch.Tensor:
    hidden_BTD = stack.embed(tokens_BT)
    for layer_idx in range(stack.architecture.num_layers):
        hidden_BTD = stack.run(stack.layer(layer_idx), hidden_BTD)
    return stack.norm(hidden_BTD)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_all_layers_in_a_row_are_the_model(tmp_path: Path, family: str) -> None:
    supernet = tiny_supernet(tmp_path / "model", family)
    stack = LayerStack(supernet, memory_bytes=RESIDENT)
    expected_BTD = whole_model(supernet).model(TOKENS_BT, use_cache=False).last_hidden_state
    torch.testing.assert_close(through(stack, TOKENS_BT), expected_BTD, rtol=1e-5, atol=1e-5)
    assert stack.work.layer_tokens == 4 * TOKENS_BT.numel()


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("mistral", {"sliding_window": 4}),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 0}),
    ],
)
@torch.no_grad()
def test_samples_longer_than_the_window(tmp_path: Path, family: str, settings: dict[str, object]) -> None:
    supernet = tiny_supernet(tmp_path / "model", family, **settings)
    stack = LayerStack(supernet, memory_bytes=RESIDENT)
    assert supernet.architecture.sliding_window == 4
    expected_BTD = whole_model(supernet).model(TOKENS_BT, use_cache=False).last_hidden_state
    torch.testing.assert_close(through(stack, TOKENS_BT), expected_BTD, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_layers_read_when_needed_give_the_same_bits(supernet: Supernet) -> None:
    resident, streamed = (LayerStack(supernet, memory_bytes=size) for size in (RESIDENT, 1000))
    assert (resident.is_resident, streamed.is_resident) == (True, False)
    assert resident.layer(0) is resident.layer(0)
    assert streamed.layer(0) is not streamed.layer(0)
    assert torch.equal(through(resident, TOKENS_BT), through(streamed, TOKENS_BT))


def importance_of(supernet: Supernet) -> Importance:
    arch, rng = supernet.architecture, np.random.default_rng(0)
    layers, heads = arch.num_layers, arch.num_heads
    return Importance(
        heads_LN=rng.normal(size=(layers, heads)),
        ffn_LF=rng.normal(size=(layers, arch.ffn_size)),
        o_mean_LQ=rng.normal(size=(layers, heads * arch.head_dim)).astype(np.float32),
        down_mean_LF=rng.normal(size=(layers, arch.ffn_size)).astype(np.float32),
        metric="WIFV",
    )


PLANS = {
    "a group of each": LayerPlan(source_layer=1, query_heads=(0, 1), kv_heads=(0,), ffn=(1, 2, 3, 7)),
    "no attention": LayerPlan(source_layer=1, query_heads=(), kv_heads=(), ffn=(0, 5)),
    "no FFN": LayerPlan(source_layer=1, query_heads=(2, 3), kv_heads=(1,), ffn=()),
    "nothing": LayerPlan(source_layer=1, query_heads=(), kv_heads=(), ffn=()),
}


@pytest.mark.parametrize("compensate", [True, False])
@pytest.mark.parametrize("name", PLANS)
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
@torch.no_grad()
def test_a_cut_layer_is_the_masked_layer(tmp_path: Path, family: str, name: str, compensate: bool) -> None:
    """Masked: inputs of o_proj and down_proj that are removed are replaced by their mean, or by zero."""
    supernet = tiny_supernet(tmp_path / "model", family)
    stack, importance, plan = LayerStack(supernet, memory_bytes=RESIDENT), importance_of(supernet), PLANS[name]
    head_dim = supernet.architecture.head_dim
    query_I = [head * head_dim + channel for head in plan.query_heads for channel in range(head_dim)]
    reference = whole_model(supernet).model.layers[1]
    for module, kept_I, mean_I in (
        (reference.self_attn.o_proj, query_I, importance.o_mean_LQ[1]),
        (reference.mlp.down_proj, list(plan.ffn), importance.down_mean_LF[1]),
    ):
        removed_I = torch.ones(module.in_features, dtype=torch.bool)
        removed_I[kept_I] = False
        filled_I = torch.tensor(mean_I) if compensate else torch.zeros(module.in_features)

        def mask(_, inputs, removed_I=removed_I, filled_I=filled_I):
            return (torch.where(removed_I, filled_I, inputs[0]),)

        module.register_forward_pre_hook(mask)
    hidden_BTD = stack.embed(TOKENS_BT)
    model = whole_model(supernet).model
    rotary = model.rotary_emb(hidden_BTD, torch.arange(TOKENS_BT.shape[1])[None])
    expected_BTD = reference(hidden_BTD, attention_mask=None, position_embeddings=rotary)
    cut = stack.cut_layer(plan, importance, compensation="removed" if compensate else "none")
    torch.testing.assert_close(stack.run(cut, hidden_BTD), expected_BTD, rtol=1e-5, atol=1e-5)
