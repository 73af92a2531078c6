from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from amoeba_export.errors import UsageError, WrongModel
from amoeba_export.ir import Architecture, FixedWidth, Importance, Shape, Strategy, validate
from amoeba_export.ir.derive import UPSTREAM_HEAD_WEIGHT, CutRules, derive_plan, flap_threshold
from amoeba_export.ir.plan import Policy

SMOL = Architecture(
    family="llama",
    num_layers=30,
    hidden_size=576,
    num_heads=9,
    num_kv_heads=3,
    head_dim=64,
    ffn_size=1536,
    vocab_size=49152,
    max_positions=8192,
    norm_eps=1e-5,
    rope_theta=1e5,
)


def strategy(architecture: Architecture = SMOL, *, seed: int = 0, metric: str = "WIFV") -> Strategy:
    rng = np.random.default_rng(seed)
    layers, heads, ffn = architecture.num_layers, architecture.num_heads, architecture.ffn_size
    channels = heads * architecture.head_dim
    return Strategy(
        model_id="m",
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=architecture.num_kv_heads,
        head_dim=architecture.head_dim,
        ffn_size=ffn,
        depth={0: (1,) * layers, 1: (*(1,) * (layers - 2), 0, 1)},
        importance=Importance(
            heads_LN=rng.normal(size=(layers, heads)),
            ffn_LF=rng.normal(size=(layers, ffn)),
            o_mean_LQ=rng.normal(size=(layers, channels)).astype(np.float32),
            down_mean_LF=rng.normal(size=(layers, ffn)).astype(np.float32),
            metric=metric,
        ),
        identity="s",
    )


def kept_share(plan) -> float:
    dims = plan.dense(SMOL).layers
    return sum(map(SMOL.prunable_params, dims)) / (len(dims) * SMOL.prunable_params())


@pytest.mark.parametrize("unit", ["kv_group", "query_per_group"])
@pytest.mark.parametrize("width", [1.0, 0.875, 0.75, 0.625, 0.5, 0.3])
def test_uniform_keeps_the_width(width: float, unit) -> None:
    plan = derive_plan(strategy(), SMOL, Shape(29, width), CutRules(unit=unit))
    assert kept_share(plan) == pytest.approx(width, abs=SMOL.unit_params / SMOL.prunable_params())
    assert plan.kept_layers == (*range(28), 29)
    assert (plan.strategy_id, plan.model_id, plan.compensate, plan.width_key) == ("s", "m", True, None)


def test_uniform_counts_at_three_quarters() -> None:
    """2 of 3 KV groups are nearest to 0.75 (2.25 of 3); neurons make up for the rest."""
    layer = derive_plan(strategy(), SMOL, Shape(30, 0.75)).layers[0]
    assert (len(layer.query_heads), len(layer.kv_heads), len(layer.ffn)) == (6, 2, 1195)


def test_the_best_stay() -> None:
    known = strategy()
    assert known.importance is not None
    for layer in derive_plan(known, SMOL, Shape(30, 0.5)).layers:
        scores_F = known.importance.ffn_LF[layer.source_layer]
        gone = np.setdiff1d(np.arange(SMOL.ffn_size), layer.ffn)
        assert scores_F[list(layer.ffn)].min() >= scores_F[gone].max()
        groups_K = known.importance.heads_LN[layer.source_layer].reshape(3, 3).mean(axis=1)
        assert set(layer.kv_heads) == set(np.argsort(-groups_K)[: len(layer.kv_heads)])


def test_query_per_group_takes_the_best_of_each_group() -> None:
    known = strategy()
    assert known.importance is not None
    layer = derive_plan(known, SMOL, Shape(30, 0.4), CutRules(unit="query_per_group")).layers[4]
    assert layer.kv_heads == (0, 1, 2)
    groups_KG = known.importance.heads_LN[4].reshape(3, 3)
    assert layer.query_heads == tuple(k * 3 + int(groups_KG[k].argmax()) for k in range(3))


@pytest.mark.parametrize("align", [8, 64, 128])
def test_align_rounds_neurons(align: int) -> None:
    free = derive_plan(strategy(), SMOL, Shape(30, 0.7)).layers[0]
    aligned = derive_plan(strategy(), SMOL, Shape(30, 0.7), CutRules(align=align)).layers[0]
    assert len(aligned.ffn) % align == 0
    assert abs(len(aligned.ffn) - len(free.ffn)) <= align / 2
    assert len(derive_plan(strategy(), SMOL, Shape(30, 0.01), CutRules(align=align)).layers[0].ffn) == align
    assert len(derive_plan(strategy(), SMOL, Shape(30, 1.0), CutRules(align=1000)).layers[0].ffn) == SMOL.ffn_size


@pytest.mark.parametrize("unit", ["kv_group", "query_per_group"])
@pytest.mark.parametrize("width", [0.9, 0.6, 0.3])
def test_adaptive_shares_one_threshold(width: float, unit) -> None:
    plan = derive_plan(strategy(), SMOL, Shape(30, width), CutRules(policy="adaptive", unit=unit))
    validate(plan, SMOL)
    biggest = SMOL.heads_per_kv * SMOL.query_head_params + 3 * SMOL.kv_head_params
    assert kept_share(plan) == pytest.approx(width, abs=biggest / (30 * SMOL.prunable_params()))
    assert len({len(layer.ffn) for layer in plan.layers}) > 1


def test_adaptive_keeps_the_same_of_a_layer_at_every_depth() -> None:
    deep = derive_plan(strategy(), SMOL, Shape(30, 0.6), CutRules(policy="adaptive", align=16))
    shallow = derive_plan(strategy(), SMOL, Shape(29, 0.6), CutRules(policy="adaptive", align=16))
    assert set(shallow.layers) < set(deep.layers)
    assert all(len(layer.ffn) % 16 == 0 for layer in deep.layers)


def test_adaptive_may_take_all_heads_of_a_layer() -> None:
    known = strategy()
    assert known.importance is not None
    heads_LN = known.importance.heads_LN.copy()
    heads_LN[7] = -100.0
    known = dataclasses.replace(known, importance=dataclasses.replace(known.importance, heads_LN=heads_LN))
    layer = derive_plan(known, SMOL, Shape(30, 0.8), CutRules(policy="adaptive")).layers[7]
    assert (layer.query_heads, layer.kv_heads) == ((), ())
    assert layer.ffn


def test_wanda_knows_no_compensation() -> None:
    assert not derive_plan(strategy(metric="wanda"), SMOL, Shape(30, 0.5)).compensate


def test_the_gate_takes_the_nearest_choice() -> None:
    plan = derive_plan(strategy(), SMOL, Shape(30, 0.7), CutRules(gate_widths=(1.0, 0.875, 0.75, 0.625)))
    assert plan.gate_width == 0.75
    assert derive_plan(strategy(), SMOL, Shape(30, 0.6875), CutRules(gate_widths=(0.625, 0.75))).gate_width == 0.75
    assert derive_plan(strategy(), SMOL, Shape(30, 0.7)).gate_width is None


def test_masks_of_the_published_code(goldens: Path) -> None:
    """From the recorded scores to the recorded masks, for both lists of ratios, an integer 1 among them."""
    for stats_name, strategy_name in (
        ("flap_stats.npz", "dp_selection_strategy.npy"),
        ("flap_stats_readme_ratios.npz", "readme_ratios/dp_selection_strategy.npy"),
    ):
        stats = np.load(goldens / "C/flap" / stats_name)
        # Our own recording, in the container that the published code writes.
        masks = np.load(goldens / "C" / strategy_name, allow_pickle=True).item()["width_mask"]
        for ratio in masks["base_model.model.model.layers.0.mlp.up_proj"]:
            heads_LN, ffn_LF = flap_threshold(
                stats["standardised_attn_metric"],
                stats["standardised_mlp_metric"],
                ratio,
                head_weight=UPSTREAM_HEAD_WEIGHT,
                upstream=True,
            )
            for layer, (heads_N, ffn_F) in enumerate(zip(heads_LN, ffn_LF, strict=True)):
                prefix = f"base_model.model.model.layers.{layer}"
                np.testing.assert_array_equal(masks[f"{prefix}.mlp.up_proj"][ratio], ffn_F)
                np.testing.assert_array_equal(masks[f"{prefix}.self_attn.q_proj"][ratio], np.repeat(heads_N, 128))


def imported() -> tuple[Strategy, Architecture]:
    """An import of a 2-layer MHA model with one width."""
    architecture = dataclasses.replace(
        SMOL, num_layers=2, num_heads=2, num_kv_heads=2, head_dim=4, ffn_size=6, hidden_size=8
    )
    fixed = FixedWidth(
        heads_LN=np.array([[True, False], [False, False]]),
        ffn_LF=np.array([[True] * 4 + [False] * 2, [True] * 6]),
        o_bias_LD=np.ones((2, 8), dtype=np.float32),
        down_bias_LD=np.ones((2, 8), dtype=np.float32),
    )
    return Strategy(
        model_id=None,
        num_layers=2,
        num_heads=2,
        num_kv_heads=2,
        head_dim=4,
        ffn_size=6,
        depth={0: (1, 1), 1: (1, 0)},
        widths={0.65: fixed},
    ), architecture


def test_an_import_supplies_its_masks_and_its_policy() -> None:
    known, architecture = imported()
    plan = derive_plan(known, architecture, Shape(2, 0.65))
    assert plan.policy == "adaptive"
    assert plan.width_key == 0.65
    assert plan.layers[0].query_heads == (0,)
    assert plan.layers[0].ffn == (0, 1, 2, 3)
    assert plan.layers[1].query_heads == plan.layers[1].kv_heads == ()
    assert derive_plan(known, architecture, Shape(1, 0.65)).policy == "uniform"


def test_an_import_without_width_1_has_no_mask_there() -> None:
    known, architecture = imported()
    plan = derive_plan(known, architecture, Shape(2, 1.0))
    assert plan.width_key is None
    assert plan.policy == "uniform"
    assert not any(layer.o_bias or layer.down_bias for layer in plan.dense(architecture).layers)
    listed = dataclasses.replace(known, widths={1.0: known.widths[0.65]})
    assert derive_plan(listed, architecture, Shape(2, 1.0)).width_key == 1.0


def test_unknown_shapes_name_the_known_ones() -> None:
    known, architecture = imported()
    with pytest.raises(UsageError) as caught:
        derive_plan(known, architecture, Shape(2, 0.5))
    assert str(caught.value) == (
        "The strategy does not know width 0.5: it was imported, with masks of its own widths only.\n"
        "  next:  Choose one of: 1, 0.65; or make a strategy of your own with 'amoeba calibrate', "
        "which knows every width."
    )
    with pytest.raises(UsageError) as caught:
        derive_plan(strategy(), SMOL, Shape(12, 0.5))
    assert str(caught.value) == (
        "The strategy does not know depth 12.\n  next:  Choose one of 29, 30, or calibrate with more removed layers."
    )


def test_a_strategy_for_other_dims_is_refused() -> None:
    with pytest.raises(WrongModel) as caught:
        derive_plan(strategy(), dataclasses.replace(SMOL, num_layers=32, ffn_size=1024), Shape(30, 1.0))
    assert caught.value.what == (
        "The strategy was made for another model: num_layers is 30 there and 32 here; "
        "ffn_size is 1536 there and 1024 here."
    )


@pytest.mark.parametrize("policy", ["uniform", "adaptive"])
@pytest.mark.parametrize("width", [1.0, 0.7, 0.4, 0.2])
def test_heads_under_one_norm_all_stay_and_neurons_make_the_width(policy: Policy, width: float) -> None:
    whole = dataclasses.replace(SMOL, qk_norm=True, qk_norm_scope="whole")
    plan = derive_plan(strategy(), whole, Shape(30, width), CutRules(policy=policy))
    assert all(layer.query_heads == tuple(range(9)) for layer in plan.layers)
    attention = 9 * SMOL.query_head_params + 3 * SMOL.kv_head_params
    wanted = max(SMOL.prunable_params() * width - attention, 0) * 30
    assert sum(len(layer.ffn) for layer in plan.layers) * SMOL.unit_params == pytest.approx(wanted, abs=1e5)
