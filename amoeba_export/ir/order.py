"""Kept layers whose kinds come in an order that a runtime takes from their positions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence


def in_order(depths: Mapping[int, tuple[int, ...]], rotated: Sequence[bool], every: int) -> dict[int, tuple[int, ...]]:
    """`depths` of a strategy, with the nearest choices in which the last of each `every` layers is not rotated.

    Nearest: as many as can be of the layers that were kept; of others, those that more depths keep. A depth for which
    the model has not enough layers of a kind is left out.

    Args:
        depths: Removed layers -> which layers stay, 0 or 1 for each.
        rotated: Of each layer of the supernet.
        every: The period.
    """
    liked = [sum(active[i] for active in depths.values()) for i in range(len(rotated))]
    chosen = {removed: _nearest(active, liked, rotated, every) for removed, active in depths.items()}
    return {removed: active for removed, active in chosen.items() if active is not None}


def _nearest(
    active: tuple[int, ...], liked: Sequence[int], rotated: Sequence[bool], every: int
) -> tuple[int, ...] | None:
    """Best by dynamic programming over (layers seen, layers kept)."""
    depth, kept_counts = sum(active), len(liked) * (max(liked) + 1)
    best: list[tuple[int, tuple[int, ...]] | None] = [(0, ()), *([None] * depth)]
    for layer, is_rotated in enumerate(rotated):
        for position in range(depth - 1, -1, -1):
            before = best[position]
            if before is None or is_rotated != ((position + 1) % every != 0):
                continue
            worth = before[0] + active[layer] * kept_counts + liked[layer]
            present = best[position + 1]
            if present is None or worth > present[0]:
                best[position + 1] = (worth, (*before[1], layer))
    found = best[depth]
    return None if found is None else tuple(int(layer in found[1]) for layer in range(len(rotated)))
