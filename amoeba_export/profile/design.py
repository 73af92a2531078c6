"""Which graphs to measure: a dozen that together tell every term of the cost model apart."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from amoeba_export.ir import Architecture, DenseArchitecture
from amoeba_export.profile.features import Counts, counts_of, dims_of, features, weights_read

_PRIOR_OVERHEAD = 0.02
"""Guess of a block's fixed cost, as a share of the time its weights take; it only shapes the choice of graphs."""

_RIDGE = 1e-9


def design_graphs(
    architecture: Architecture,
    *,
    num_graphs: int = 12,
    min_depth: int | None = None,
    min_width: float = 0.25,
    align: int = 1,
) -> list[DenseArchitecture]:
    """Choose `num_graphs` cuts of `architecture` to measure; the uncut model always comes first.

    The choice is D-optimal: it maximises det(X^T X) over the relative feature rows X of the cost model, by greedy
    forward selection and then Fedorov's exchange, no graph twice. The pool has depths from `min_depth` to full, widths
    from `min_width` to full, uniform and mixed layers, layers without attention or without FFN. Such a design sits on
    the corners, where an additive model cannot see that it bends: two graphs are therefore fixed in the middle of the
    space, so that bending shows in the residuals and widens the error bars. Shallow graphs live in the cache and
    mislead, so `min_depth` should be that of the search (default: half the layers), not less.

    Args:
        architecture: The supernet.
        num_graphs: How many graphs; eight or more, since the model has six terms at one KV length.
        min_depth: Fewest layers of a graph.
        min_width: Fewest neurons of a layer, as a share.
        align: Neuron counts are multiples of this.

    Returns:
        Distinct graphs, from the heaviest to the lightest; fewer than `num_graphs` only if the pool has fewer.
    """
    align, full_depth = architecture.ffn_align(align), architecture.num_layers
    shallow = max(1, min(full_depth, min_depth if min_depth is not None else max(2, full_depth // 2)))
    depths = sorted({round(shallow + (full_depth - shallow) * step / 4) for step in range(5)})
    min_ffn = _rounded(architecture.ffn_size * min_width, align, architecture.ffn_size)
    fixed, others = _pool(architecture, depths, min_ffn, align)
    pool = list(dict.fromkeys([*fixed, *others]))
    dims = dims_of(architecture)
    prior = _prior_costs(architecture)
    names = [name for name in prior if name in features(pool[0], dims, "decode", 1)]
    rows = np.array([[features(graph, dims, "decode", 1)[name] for name in names] for graph in pool])
    rows *= np.array([prior[name] for name in names])
    relative = rows / rows.sum(axis=1, keepdims=True)
    chosen = _d_optimal(relative, min(num_graphs, len(pool)), num_fixed=len(set(fixed)))
    graphs = [_dense(architecture, pool[i]) for i in chosen]
    return [graphs[0], *sorted(graphs[1:], key=lambda graph: -graph.num_params)]


def graphs_between(
    architecture: Architecture,
    measured: Sequence[DenseArchitecture],
    *,
    num_graphs: int,
    min_depth: int | None = None,
    align: int = 1,
) -> list[DenseArchitecture]:
    """Cuts whose sizes lie between those of `measured`, each in the middle of the widest gap that is left.

    A D-optimal design sits on the corners. Where time bends with size, graphs between them tell where.
    """
    align, dims, full_depth = architecture.ffn_align(align), dims_of(architecture), architecture.num_layers
    shallow = max(1, min(full_depth, min_depth if min_depth is not None else max(2, full_depth // 2)))
    groups, per_kv = architecture.num_kv_heads, architecture.heads_per_kv
    sizes = sorted(weights_read(counts_of(dense), dims) for dense in measured)
    taken, chosen = {counts_of(dense) for dense in measured}, []
    pool = {
        graph: weights_read(graph, dims)
        for depth in range(shallow, full_depth + 1)
        for eighths in range(3, 9)
        for graph in [
            (Counts(groups * per_kv, groups, _rounded(architecture.ffn_size * eighths / 8, align, dims["ffn_size"])),)
            * depth
        ]
    }
    for _ in range(num_graphs):
        low, high = max(pairwise(sizes), key=lambda pair: pair[1] - pair[0], default=(0.0, 0.0))
        within = [graph for graph, size in pool.items() if low < size < high and graph not in taken]
        if not within:
            break
        best = min(within, key=lambda graph: abs(pool[graph] - (low + high) / 2))
        taken.add(best)
        chosen.append(_dense(architecture, best))
        sizes = sorted([*sizes, pool[best]])
    return chosen


def _pool(
    architecture: Architecture, depths: Sequence[int], min_ffn: int, align: int
) -> tuple[list[tuple[Counts, ...]], list[tuple[Counts, ...]]]:
    """The graphs to measure in any case, the uncut one first, and those to choose from."""
    num_kv, per_kv, ffn = architecture.num_kv_heads, architecture.heads_per_kv, architecture.ffn_size
    attentions = [(num_kv * per_kv, num_kv), (per_kv, 1), (num_kv, num_kv)]
    middle = max(1, num_kv // 2)
    attentions.append((middle * per_kv, middle))
    neurons = [ffn, _rounded((ffn + min_ffn) / 2, align, ffn), min_ffn]
    blocks = [Counts(*attention, size) for attention in attentions for size in neurons]
    full, small = Counts(*attentions[0], ffn), Counts(*attentions[1], min_ffn)
    partners = [
        (full, small),
        (full, Counts(0, 0, ffn)),
        (full, Counts(*attentions[0], 0)),
        (small, Counts(0, 0, min_ffn)),
        (small, Counts(*attentions[1], 0)),
        (Counts(*attentions[0], min_ffn), Counts(*attentions[1], ffn)),
    ]
    pool: list[tuple[Counts, ...]] = []
    for depth in sorted(depths, reverse=True):
        pool.extend((block,) * depth for block in blocks)
        pool.extend(tuple(pair[i % 2] for i in range(depth)) for pair in partners)
    quarter, half = depths[len(depths) // 4], depths[len(depths) // 2]
    middles = [(Counts(*attentions[3], neurons[1]),) * half, (Counts(*attentions[0], neurons[1]),) * quarter]
    return [(full,) * depths[-1], *middles], pool


def _prior_costs(architecture: Architecture) -> dict[str, float]:
    """Decode cost of each term if time were weights read, plus a little for each block."""
    attention = architecture.prunable_params() - architecture.ffn_size * architecture.unit_params
    overhead = _PRIOR_OVERHEAD * architecture.prunable_params()
    return {
        "base": float(architecture.head_params) + overhead,
        "attention_blocks": overhead,
        "ffn_blocks": overhead,
        "query_heads": float(architecture.num_heads * architecture.query_head_params),
        "kv_heads": float(attention - architecture.num_heads * architecture.query_head_params),
        "ffn": float(architecture.active_units(architecture.ffn_size) * architecture.unit_params),
        "experts": overhead,
    }


def _d_optimal(rows: NDArray[np.float64], count: int, *, num_fixed: int) -> list[int]:
    """`count` rows with a large det(X^T X), the first `num_fixed` among them and first."""
    rows = rows / np.linalg.norm(rows, axis=0)
    chosen = list(range(min(num_fixed, count)))
    while len(chosen) < count:
        rest = [i for i in range(len(rows)) if i not in chosen]
        chosen.append(max(rest, key=lambda i: _log_det(rows, [*chosen, i])))
    improved = True
    while improved:
        improved = False
        for position in range(num_fixed, count):
            rest = [i for i in range(len(rows)) if i not in chosen]
            if not rest:
                break
            trial = {i: [*chosen[:position], i, *chosen[position + 1 :]] for i in rest}
            best = max(rest, key=lambda i: _log_det(rows, trial[i]))
            if _log_det(rows, trial[best]) > _log_det(rows, chosen) + 1e-6:
                chosen = trial[best]
                improved = True
    return chosen


def _log_det(rows: NDArray[np.float64], chosen: Sequence[int]) -> float:
    x = rows[list(chosen)]
    return float(np.linalg.slogdet(x.T @ x + _RIDGE * np.eye(x.shape[1]))[1])


def _dense(architecture: Architecture, graph: Sequence[Counts]) -> DenseArchitecture:
    """The dims of `graph` as a cut of the first layers, with the biases that a compensated cut of these counts has."""
    layers = tuple(
        architecture.cut_layer(one.num_heads, one.num_kv_heads, one.ffn_size, kind=architecture.kind_index(i))
        for i, one in enumerate(graph)
    )
    return DenseArchitecture(base=architecture, layers=layers)


def _rounded(count: float, align: int, size: int) -> int:
    """The multiple of `align` nearest to `count`, at least one multiple and at most `size`."""
    return min(size, max(1, round(count / align)) * align)
