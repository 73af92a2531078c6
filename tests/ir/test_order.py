"""Kept layers in an order that a runtime takes from their positions."""

from __future__ import annotations

from amoeba_export.ir.order import in_order

ROTATED = [True, True, True, False] * 3


def test_what_is_in_order_stays_as_it_is() -> None:
    depths = {0: (1,) * 12, 4: (1, 1, 1, 1, 0, 0, 0, 0, 1, 1, 1, 1)}
    assert in_order(depths, ROTATED, 4) == depths


def test_the_nearest_choice_in_order_keeps_what_it_can() -> None:
    """Of 7 kept layers the fourth alone may be unrotated: layer 7 has to go, and the rotated layer 6 comes back."""
    active = (1, 1, 0, 0, 0, 1, 0, 1, 1, 1, 0, 1)
    ((removed, found),) = in_order({5: active}, ROTATED, 4).items()
    kept = [i for i, stays in enumerate(found) if stays]
    assert removed == 5 and len(kept) == 7
    assert [ROTATED[i] for i in kept] == [(place + 1) % 4 != 0 for place in range(7)]
    assert sum(a and b for a, b in zip(active, found, strict=True)) == 6


def test_a_depth_for_which_there_are_too_few_layers_is_left_out() -> None:
    assert in_order({2: (1, 1, 0, 0)}, [False, False, True, True], 4) == {2: (0, 0, 1, 1)}
    assert in_order({0: (1, 1)}, [False, False], 4) == {}
