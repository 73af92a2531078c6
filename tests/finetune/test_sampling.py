from __future__ import annotations

import dataclasses
from collections import Counter

import pytest

from amoeba_export.errors import BadValue
from amoeba_export.finetune.sampling import ShapeSampler, one_shape, sandwich
from amoeba_export.finetune.settings import Settings
from amoeba_export.ir import Shape, Strategy

STRATEGY = Strategy(
    model_id=None,
    num_layers=4,
    num_heads=2,
    num_kv_heads=2,
    head_dim=4,
    ffn_size=8,
    depth={0: (1, 1, 1, 1), 1: (1, 0, 1, 1), 2: (1, 0, 0, 1)},
)
SETTINGS = Settings(widths=(0.5, 1.0, 0.75), subnets=4, seed=1)


def test_a_draw_is_the_full_shape_random_ones_and_the_smallest() -> None:
    sampler = sandwich(STRATEGY, SETTINGS)
    seen: Counter[Shape] = Counter()
    for step in range(200):
        full, *between, smallest = sampler.sample(step)
        assert (full, smallest) == (Shape(4, 1.0), Shape(2, 0.5))
        assert len(between) == 2
        assert len({shape.width for shape in between}) == 2  # widths are drawn without replacement
        seen.update(between)
    assert set(seen) == {Shape(depth, width) for depth in (3, 2) for width in (1.0, 0.75, 0.5)}
    assert min(seen.values()) > 30


def test_a_draw_is_a_function_of_seed_step_and_micro_batch() -> None:
    sampler, other = sandwich(STRATEGY, SETTINGS), sandwich(STRATEGY, dataclasses.replace(SETTINGS, seed=2))
    draws = [sampler.sample(step, micro) for step in range(20) for micro in range(2)]
    assert draws == [sampler.sample(step, micro) for step in range(20) for micro in range(2)]
    assert len(set(draws[::2])) > 1
    assert draws[::2] != draws[1::2]
    assert [other.sample(step) for step in range(20)] != draws[::2]


def test_every_shape_that_can_be_drawn_is_listed() -> None:
    sampler = sandwich(STRATEGY, dataclasses.replace(SETTINGS, depths=(2,)))
    assert sampler.shapes() == tuple(Shape(depth, width) for depth in (4, 2) for width in (1.0, 0.75, 0.5))
    assert {shape for step in range(50) for shape in sampler.sample(step)} <= set(sampler.shapes())


def test_more_random_subnets_than_widths_repeat_widths() -> None:
    sampler = ShapeSampler(depths=(4, 2), widths=(1.0,), subnets=5, seed=0)
    assert sampler.sample(0) == (Shape(4, 1.0), *[Shape(2, 1.0)] * 4)


def test_one_shape_is_drawn_alone() -> None:
    assert one_shape(Shape(3, 0.75)).sample(7) == (Shape(3, 0.75),) == one_shape(Shape(3, 0.75)).shapes()


def test_a_depth_that_the_strategy_lacks_is_refused() -> None:
    with pytest.raises(BadValue) as caught:
        sandwich(STRATEGY, dataclasses.replace(SETTINGS, depths=(1,)))
    assert str(caught.value) == "A depth cannot be '1'.\n  next:  Give depths of the strategy: 2, 3, 4."
