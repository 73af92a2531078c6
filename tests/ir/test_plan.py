from __future__ import annotations

import dataclasses

import pytest

from amoeba_export.errors import BadValue, InputError
from amoeba_export.ir import Architecture, LayerPlan, Shape, SubnetPlan, validate
from amoeba_export.ir.plan import nearest_gate_width

ARCHITECTURE = Architecture(
    family="llama",
    num_layers=3,
    hidden_size=64,
    num_heads=6,
    num_kv_heads=3,
    head_dim=16,
    ffn_size=96,
    vocab_size=128,
    max_positions=256,
    norm_eps=1e-6,
    rope_theta=1e4,
)


def layer(source_layer: int, heads: tuple[int, ...], kv_heads: tuple[int, ...], ffn: int = 96) -> LayerPlan:
    return LayerPlan(source_layer=source_layer, query_heads=heads, kv_heads=kv_heads, ffn=tuple(range(ffn)))


def plan(*layers: LayerPlan, policy: str = "adaptive") -> SubnetPlan:
    return SubnetPlan(shape=Shape(len(layers), 0.5), policy=policy, layers=layers)  # type: ignore[arg-type]


def test_the_full_plan_is_valid_and_keeps_every_weight():
    full = SubnetPlan.full(ARCHITECTURE)
    validate(full, ARCHITECTURE)
    dense = full.dense(ARCHITECTURE)
    assert dense.is_uniform
    assert dense.layers[0] == ARCHITECTURE.layer_dims


def test_a_plan_survives_json():
    cut = plan(layer(0, (0, 1), (0,), 10), layer(2, (), (), 0))
    cut = dataclasses.replace(cut, width_key=0.5, gate_width=0.5, strategy_id="s", model_id="m")
    assert SubnetPlan.from_json(cut.to_json()) == cut


def test_only_cut_blocks_get_a_compensation_bias():
    dense = plan(layer(0, (0, 1), (0,)), layer(1, tuple(range(6)), (0, 1, 2), 10)).dense(ARCHITECTURE)
    assert [(dims.o_bias, dims.down_bias) for dims in dense.layers] == [(True, False), (False, True)]


def test_a_plan_says_whether_it_needs_a_strategy():
    """A source with biases of its own still needs the means for those that stand for what was removed."""
    biased = dataclasses.replace(ARCHITECTURE, o_bias=True, mlp_bias=True)
    cut = plan(layer(0, (0, 1), (0,), 10))
    assert cut.is_compensated(biased)
    assert cut.dense(biased) == dataclasses.replace(cut, compensate=False).dense(biased)
    assert not dataclasses.replace(cut, compensate=False).is_compensated(biased)
    assert not SubnetPlan.full(biased).is_compensated(biased)
    assert dataclasses.replace(SubnetPlan.full(biased), width_key=1.0).is_compensated(biased)


@pytest.mark.parametrize(
    ("choices", "width", "expected"),
    [((), 1.0, None), ((0.9, 0.5), 1.0, 0.9), ((1.0, 0.5), 0.75, 1.0), ((0.5, 1.0), 0.6, 0.5)],
)
def test_a_gate_is_asked_for_the_nearest_width_that_it_knows(choices, width, expected):
    assert nearest_gate_width(choices, width) == expected
    if width == 1.0:
        assert SubnetPlan.full(ARCHITECTURE, gate_widths=choices).gate_width == expected


def test_active_layers_are_the_gate_input():
    assert plan(layer(0, (0, 1), (0,)), layer(2, (), (), 0)).active_layers(3) == (1, 0, 1)


@pytest.mark.parametrize(
    ("broken", "problem"),
    [
        (plan(), "it keeps no layer"),
        (plan(layer(1, (0, 1), (0,)), layer(0, (0, 1), (0,))), "its layers are not in increasing order: [1, 0]"),
        (plan(layer(3, (0, 1), (0,))), "it names layers outside 0..2: [3]"),
        (plan(layer(0, (1, 0), (0,))), "layer 0: query heads are not sorted and unique"),
        (plan(layer(0, (0, 2), (0,))), "layer 0: query head 2 reads KV head 1, which is not kept"),
        (plan(layer(0, (0, 1, 2), (0, 1))), "layer 0: KV heads serve different numbers of query heads: {0: 2, 1: 1}"),
        (plan(layer(0, (), (0,))), "layer 0: query heads and KV heads must vanish together"),
        (
            plan(layer(0, (0, 1), (0,)), layer(1, (0, 1), (0,), 5), policy="uniform"),
            "it is called uniform and its layers keep different counts: [(2, 1, 5), (2, 1, 96)]",
        ),
    ],
)
def test_a_broken_rule_is_named(broken: SubnetPlan, problem: str):
    with pytest.raises(InputError) as caught:
        validate(broken, ARCHITECTURE)
    assert problem in caught.value.what


def test_heads_under_one_norm_stay_together():
    whole = dataclasses.replace(ARCHITECTURE, qk_norm=True, qk_norm_scope="whole")
    validate(plan(layer(0, tuple(range(6)), (0, 1, 2), 5), layer(1, (), ())), whole)
    with pytest.raises(InputError) as caught:
        validate(plan(layer(0, (0, 1), (0,))), whole)
    assert (
        "layer 0: it keeps 2 of 6 heads, and one norm runs over all of them: without some, the others would be scaled "
        "differently"
    ) in caught.value.what


def test_all_broken_rules_are_named_at_once():
    with pytest.raises(InputError, match=r"layer 0: .*layer 1: "):
        validate(plan(layer(0, (1, 0), (0,)), layer(1, (), (0,))), ARCHITECTURE)


def test_a_shape_is_read_and_written():
    assert Shape.parse("24x0.75") == Shape(24, 0.75)
    assert str(Shape(24, 0.75)) == "24x0.75"
    assert str(Shape(30, 1.0)) == "30x1"


@pytest.mark.parametrize("text", ["24", "0x1", "24x0", "24x1.5", "x", "24x0.75x2", "-1x1"])
def test_a_bad_shape_is_refused(text: str):
    with pytest.raises(BadValue) as caught:
        Shape.parse(text)
    assert str(caught.value) == (
        f"A shape cannot be '{text}'.\n  next:  Give DEPTHxWIDTH with a width above 0 and at most 1, such as 24x0.75."
    )


def test_a_file_that_is_not_a_plan_is_an_input_error():
    with pytest.raises(InputError) as caught:
        SubnetPlan.from_json({"schema_version": 1}, where="plan.json")
    assert str(caught.value) == (
        "This is not a plan: it has no key 'shape'.\n"
        "  where: plan.json\n"
        "  next:  Give the plan.json of an artifact, or write one with 'amoeba search --json'."
    )
