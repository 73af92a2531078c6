"""What a layer loses with its heads and neurons, as one additive figure.

Letters: L layers, N query heads, K KV heads, G query heads per KV head, F neurons.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from amoeba_export.ir import Architecture, Importance, LayerPlan, SubnetPlan

FloatArray = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Retained:
    """Share of each block's importance that a choice of heads or neurons keeps, 0 to 1.

    A FLAP score is the squared error that its channel's removal causes in the block's output, standardised per layer,
    which hides each layer's scale and offset. Dividing by the block's sum undoes the scale; the offset is taken to be
    the block's least score, whose error is next to nothing in practice. What remains is the kept share of the block's
    output variance: 1 - share is its relative error, the same unit for every block, and the error of a residual stream
    is the sum over its blocks. Blocks count alike, since nothing measured tells their weights apart.

    Attributes:
        heads_LN: Share of each query head; rows sum to 1.
        ffn_LF: Share of each neuron; rows sum to 1.
        heads_per_kv: Query heads of one KV head.
    """

    heads_LN: FloatArray
    ffn_LF: FloatArray
    heads_per_kv: int

    @classmethod
    def of(cls, importance: Importance, architecture: Architecture) -> Retained:
        """Shares from standardised scores."""
        return cls(
            heads_LN=_shares(importance.heads_LN),
            ffn_LF=_shares(importance.ffn_LF),
            heads_per_kv=architecture.heads_per_kv,
        )

    def share(self, plan: SubnetPlan) -> float:
        """Mean over the blocks of the kept layers of `plan`."""
        total = sum(
            float(self.heads_LN[layer.source_layer, list(layer.query_heads)].sum())
            + float(self.ffn_LF[layer.source_layer, list(layer.ffn)].sum())
            for layer in plan.layers
        )
        return total / (2 * len(plan.layers))

    def attention_values(self, layer: int, options: list[tuple[int, int]]) -> FloatArray:
        """What `layer` keeps with the best choice of each (query heads, KV heads)."""
        scores_KG = -np.sort(-self._groups(layer), axis=1)
        values = []
        for num_heads, num_kv_heads in options:
            per_group = num_heads // num_kv_heads if num_kv_heads else 0
            values.append(float(np.sort(scores_KG[:, :per_group].sum(axis=1))[::-1][:num_kv_heads].sum()))
        return np.array(values)

    def ffn_values(self, layer: int, options: list[int]) -> FloatArray:
        """What `layer` keeps with the best choice of each number of neurons."""
        cumulated = np.concatenate([[0.0], np.cumsum(np.sort(self.ffn_LF[layer])[::-1])])
        values: FloatArray = cumulated[np.array(options)]
        return values

    def layer_plan(self, layer: int, num_heads: int, num_kv_heads: int, ffn_size: int) -> LayerPlan:
        """The best heads and neurons of `layer` for these counts; lower indices win ties."""
        heads: list[int] = []
        per_group = num_heads // num_kv_heads if num_kv_heads else 0
        scores_KG = self._groups(layer)
        best_KG = np.argsort(-scores_KG, axis=1, kind="stable")[:, :per_group]
        group_values = np.take_along_axis(scores_KG, best_KG, axis=1).sum(axis=1)
        kv_heads = sorted(map(int, np.argsort(-group_values, kind="stable")[:num_kv_heads]))
        for group in kv_heads:
            heads.extend(group * self.heads_per_kv + int(member) for member in best_KG[group])
        neurons = np.argsort(-self.ffn_LF[layer], kind="stable")[:ffn_size]
        return LayerPlan(
            source_layer=layer,
            query_heads=tuple(sorted(heads)),
            kv_heads=tuple(kv_heads),
            ffn=tuple(sorted(map(int, neurons))),
        )

    def _groups(self, layer: int) -> FloatArray:
        scores_KG: FloatArray = self.heads_LN[layer].reshape(-1, self.heads_per_kv)
        return scores_KG


def _shares(scores: FloatArray) -> FloatArray:
    """Rows shifted to a least value of 0 and scaled to a sum of 1; a constant row becomes uniform."""
    shifted = scores - scores.min(axis=1, keepdims=True)
    totals = shifted.sum(axis=1, keepdims=True)
    even = np.full_like(shifted, 1 / scores.shape[1])
    shares: FloatArray = np.where(totals > 0, shifted / np.where(totals > 0, totals, 1.0), even)
    return shares
