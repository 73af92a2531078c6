"""The sliced forward computes what transformers computes, and what a model cut by hand computes."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from amoeba_export.finetune.model import SlicedSupernet
from amoeba_export.finetune.settings import LowRankSettings
from amoeba_export.finetune.smol import TrainedLowRank, adapters_at
from amoeba_export.ir import Adapter, AdapterDelta, InputId, LayerPlan, Policy, Shape, SubnetPlan
from amoeba_export.ir.derive import CutRules, Unit, derive_plan
from tests.finetune.models import tiny_supernet
from tests.tiny import FAMILIES, VOCAB, save_tiny


def tokens(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, VOCAB, shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_full_net_gives_the_logits_of_transformers(tiny_dirs: dict[str, Path], family: str) -> None:
    supernet = tiny_supernet(tiny_dirs[family])
    model = SlicedSupernet(supernet)
    stock = AutoModelForCausalLM.from_pretrained(tiny_dirs[family], dtype=torch.float32).eval()
    input_ids_BT = tokens(2, 17)
    with torch.no_grad():
        ours_PV = model.logits(model(input_ids_BT, cut=model.cut(SubnetPlan.full(supernet.architecture))))
        theirs_PV = stock(input_ids_BT).logits.flatten(0, 1)
    assert (ours_PV - theirs_PV).abs().max() <= 1e-4


@pytest.mark.parametrize(
    ("family", "overrides"),
    [
        ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 5e4, "factor": 4.0}}),
        (
            "llama",
            {
                "rope_parameters": {
                    "rope_type": "llama3",
                    "rope_theta": 5e5,
                    "factor": 8.0,
                    "low_freq_factor": 1.0,
                    "high_freq_factor": 4.0,
                    "original_max_position_embeddings": 64,
                }
            },
        ),
        ("llama", {"attention_bias": True, "mlp_bias": True}),
        ("mistral", {"sliding_window": 5}),
    ],
    ids=["linear-rope", "llama3-rope", "biases", "window"],
)
def test_the_variants_of_a_family_give_the_logits_of_transformers(
    tmp_path: Path, family: str, overrides: dict[str, object]
) -> None:
    folder = save_tiny(tmp_path / "model", family, **overrides)
    supernet = tiny_supernet(folder)
    model = SlicedSupernet(supernet)
    stock = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    input_ids_BT = tokens(1, 40)
    with torch.no_grad():
        ours_PV = model.logits(model(input_ids_BT, cut=model.cut(SubnetPlan.full(supernet.architecture))))
        theirs_PV = stock(input_ids_BT).logits.flatten(0, 1)
    assert (ours_PV - theirs_PV).abs().max() <= 1e-4


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("policy", "unit"), [("uniform", "kv_group"), ("adaptive", "kv_group"), ("uniform", "query_per_group")]
)
def test_a_cut_net_equals_transformers_with_zeroed_channels(
    tiny_dirs: dict[str, Path], family: str, policy: Policy, unit: Unit
) -> None:
    """The reference multiplies by zero and adds the mean, by hooks on the inputs of o_proj and down_proj."""
    supernet = tiny_supernet(tiny_dirs[family])
    architecture, strategy = supernet.architecture, supernet.strategy
    assert strategy is not None and strategy.importance is not None
    plan = derive_plan(strategy, architecture, Shape(3, 0.5), CutRules(policy=policy, unit=unit))
    stock = AutoModelForCausalLM.from_pretrained(tiny_dirs[family], dtype=torch.float32).eval()
    for layer in plan.layers:
        i, head_dim = layer.source_layer, architecture.head_dim
        block = stock.model.layers[i]
        query = [head * head_dim + d for head in layer.query_heads for d in range(head_dim)]
        for module, kept, means_LI in (
            (block.self_attn.o_proj, query, strategy.importance.o_mean_LQ),
            (block.mlp.down_proj, list(layer.ffn), strategy.importance.down_mean_LF),
        ):
            mask_I = torch.zeros(module.in_features)
            mask_I[kept] = 1.0
            mean_I = torch.from_numpy(means_LI[i])
            module.register_forward_pre_hook(
                lambda _, x, mask_I=mask_I, mean_I=mean_I: (x[0] * mask_I + mean_I * (1 - mask_I),)
            )
    kept_blocks = torch.nn.ModuleList(stock.model.layers[layer] for layer in plan.kept_layers)
    stock.model.layers = kept_blocks
    stock.config.num_hidden_layers = len(kept_blocks)
    model = SlicedSupernet(supernet)
    input_ids_BT = tokens(2, 11)
    with torch.no_grad():
        ours_PV = model.logits(model(input_ids_BT, cut=model.cut(plan)))
        theirs_PV = stock(input_ids_BT, use_cache=False).logits.flatten(0, 1)
    assert (ours_PV - theirs_PV).abs().max() <= 1e-4


def test_what_a_shape_keeps_is_a_slice(tiny_dirs: dict[str, Path]) -> None:
    """No copy of a weight is made for the shapes of a strategy."""
    supernet = tiny_supernet(tiny_dirs["llama"])
    assert supernet.strategy is not None
    model = SlicedSupernet(supernet)
    cut = model.cut(derive_plan(supernet.strategy, supernet.architecture, Shape(3, 0.5)))
    assert all(isinstance(kept.held, slice) for layer in cut.layers for kept in (layer.query, layer.kv, layer.ffn))


def test_a_layer_without_heads_or_neurons_adds_its_mean_before_what_follows(tiny_dirs: dict[str, Path]) -> None:
    """The FFN of a layer without attention sees the attention's mean."""
    supernet = tiny_supernet(tiny_dirs["llama"])
    architecture = supernet.architecture
    heads, kv, ffn = range(architecture.num_heads), range(architecture.num_kv_heads), range(architecture.ffn_size)
    plan = SubnetPlan(
        shape=Shape(2, 0.5),
        policy="adaptive",
        layers=(
            LayerPlan(source_layer=0, query_heads=(), kv_heads=(), ffn=tuple(ffn)),
            LayerPlan(source_layer=2, query_heads=tuple(heads), kv_heads=tuple(kv), ffn=()),
        ),
    )
    model = SlicedSupernet(supernet)
    cut = model.cut(plan)
    input_ids_BT = tokens(1, 9)
    stock = AutoModelForCausalLM.from_pretrained(tiny_dirs["llama"], dtype=torch.float32).eval()
    first, second = stock.model.layers[0], stock.model.layers[2]
    with torch.no_grad():
        x = stock.model.embed_tokens(input_ids_BT)
        x = x + first.self_attn.o_proj.weight @ torch.from_numpy(supernet.strategy.importance.o_mean_LQ[0])
        x = x + first.mlp(first.post_attention_layernorm(x))
        cos_sin = stock.model.rotary_emb(x, torch.arange(9)[None])
        x = x + second.self_attn(second.input_layernorm(x), position_embeddings=cos_sin, attention_mask=None)[0]
        x = x + second.mlp.down_proj.weight @ torch.from_numpy(supernet.strategy.importance.down_mean_LF[2])
        theirs_PV = stock.lm_head(stock.model.norm(x)).flatten(0, 1)
        ours_PV = model.logits(model(input_ids_BT, cut=cut))
    assert (ours_PV - theirs_PV).abs().max() <= 1e-4


def test_packed_examples_do_not_see_each_other(tiny_dirs: dict[str, Path]) -> None:
    supernet = tiny_supernet(tiny_dirs["qwen3"])
    model = SlicedSupernet(supernet)
    cut = model.cut(SubnetPlan.full(supernet.architecture))
    first, second = tokens(1, 7, seed=1), tokens(1, 5, seed=2)
    packed = torch.cat([first, second, torch.zeros(1, 3, dtype=torch.int64)], dim=1)
    segments = torch.tensor([[1] * 7 + [2] * 5 + [0] * 3])
    with torch.no_grad():
        together_PV = model.logits(model(packed, cut=cut, segments_BT=segments, select_BT=segments > 0))
        apart_PV = torch.cat([model.logits(model(first, cut=cut)), model.logits(model(second, cut=cut))])
    assert (together_PV - apart_PV).abs().max() <= 1e-5


def test_selected_positions_have_the_logits_that_they_have_among_all(tiny_dirs: dict[str, Path]) -> None:
    supernet = tiny_supernet(tiny_dirs["llama"])
    model = SlicedSupernet(supernet)
    cut = model.cut(SubnetPlan.full(supernet.architecture))
    input_ids_BT, select_BT = tokens(2, 8), torch.rand(2, 8, generator=torch.Generator().manual_seed(1)) > 0.5
    with torch.no_grad():
        some_PV = model.logits(model(input_ids_BT, cut=cut, select_BT=select_BT))
        all_PV = model.logits(model(input_ids_BT, cut=cut))
    assert (some_PV - all_PV[select_BT.flatten()]).abs().max() <= 1e-6


@pytest.mark.parametrize("mode", ["smol", "lora"])
def test_recomputed_layers_give_the_gradients_of_kept_ones(tiny_dirs: dict[str, Path], mode: str) -> None:
    supernet = tiny_supernet(tiny_dirs["llama"])
    assert supernet.strategy is not None
    plan = derive_plan(supernet.strategy, supernet.architecture, Shape(3, 0.5), CutRules(gate_widths=(1.0, 0.5)))
    gradients = []
    for checkpoint_layers in (False, True):
        settings = LowRankSettings(mode=mode, rank=2, experts=3)
        low_rank = randomised(
            TrainedLowRank(
                supernet.family, supernet.architecture, settings, (1.0, 0.5), generator=torch.Generator().manual_seed(0)
            )
        )
        model = SlicedSupernet(supernet, checkpoint_layers=checkpoint_layers)
        logits_PV = model.logits(model(tokens(2, 9), cut=model.cut(plan), low_rank=low_rank.at(plan)))
        logits_PV.square().mean().backward()
        gradients.append([p.grad for p in low_rank.parameters() if p.grad is not None])
    assert len(gradients[0]) == len(gradients[1]) > 0
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*gradients, strict=True))


def randomised(low_rank: TrainedLowRank, seed: int = 5) -> TrainedLowRank:
    """B starts at zero; give it values, so that the adapter does something."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in low_rank.b.values():
            parameter.normal_(0, 0.1, generator=generator)
    return low_rank


@dataclasses.dataclass
class OneDelta:
    """An adapter that changes one module."""

    module: str
    change: AdapterDelta
    input: InputId = dataclasses.field(default_factory=lambda: InputId(role="adapter", id="one", sha256="0"))
    width_choices: tuple[float, ...] = ()

    def modules(self) -> list[str]:
        return [self.module]

    def delta(self, module: str, plan: SubnetPlan) -> AdapterDelta | None:
        return self.change if module == self.module else None


def test_finished_adapters_add_up() -> None:
    generator = torch.Generator().manual_seed(0)
    name = "model.layers.0.mlp.up_proj"
    deltas = [
        AdapterDelta(
            a_RI=torch.randn(rank, 6, generator=generator), b_OR=torch.randn(5, rank, generator=generator), scale=scale
        )
        for rank, scale in ((2, 0.5), (3, 2.0))
    ]
    adapters: list[Adapter] = [OneDelta(name, delta) for delta in deltas]
    plan = SubnetPlan(shape=Shape(1, 1.0), policy="uniform", layers=())
    pair = adapters_at(adapters, plan)(name)
    assert pair is not None
    a_RI, b_OR = pair
    expected = sum(delta.scale * delta.b_OR @ delta.a_RI for delta in deltas)
    assert np.allclose((b_OR @ a_RI).numpy(), expected.numpy(), atol=1e-6)
    assert adapters_at(adapters, plan)("model.layers.0.mlp.gate_proj") is None
