"""The latency model as the search sees it, and what measured artifacts teach it on the way."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from statistics import fmean
from typing import Protocol, runtime_checkable

from amoeba_export.ir import DenseArchitecture, Latency, Metric

ALIKE = 1.05
"""Models whose predicted times are within this factor tell the same about predictions: what they differ by is noise."""

Counts = tuple[tuple[int, int, int, int], ...]


class Predictor(Protocol):
    """Anything that can tell the latency of a cut model without running it; a cost table is one."""

    def predict(self, dense: DenseArchitecture, metric: Metric = "decode", percentile: int = 50) -> tuple[float, float]:
        """Milliseconds, and the relative half-width of the uncertainty."""


@runtime_checkable
class Bent(Predictor, Protocol):
    """A predictor that is no sum over the parts of a model, but the largest of several."""

    def pieces(self, dense: DenseArchitecture, metric: Metric = "decode", percentile: int = 50) -> tuple[float, ...]:
        """The sums in milliseconds, as many for every model."""


def counts_of(dense: DenseArchitecture) -> Counts:
    """Heads, KV heads, neurons and kind of each layer: models that share them are the same to a search."""
    return tuple((layer.num_heads, layer.num_kv_heads, layer.ffn_size, layer.kind) for layer in dense.layers)


class Corrected:
    """A predictor that agrees with what was measured in this run.

    A prediction is multiplied by measured / predicted of the measured models, interpolated over predicted time and held
    constant outside of it: drift since the table was recorded and local errors of the model cancel, and the closer the
    search comes to its budget, the more exact it is there. Models of nearly the same predicted time are one point,
    their mean: a search that believed each of them would run after their noise. A measured model itself has its
    measured latency and no uncertainty; the last measurement of a model counts.
    """

    def __init__(self, predictor: Predictor, measured: Sequence[tuple[DenseArchitecture, Latency]] = ()) -> None:
        self._predictor = predictor
        self._measured = {counts_of(dense): (dense, latency) for dense, latency in measured}
        self._ratios: dict[tuple[Metric, int], list[tuple[float, float]]] = {}

    def predict(self, dense: DenseArchitecture, metric: Metric = "decode", percentile: int = 50) -> tuple[float, float]:
        """Milliseconds, and the relative half-width of the uncertainty."""
        if known := self._measured.get(counts_of(dense)):
            return known[1].of(metric, percentile), 0.0
        raw_ms, error = self._predictor.predict(dense, metric, percentile)
        return raw_ms * self.ratio(raw_ms, metric, percentile), error

    def pieces(self, dense: DenseArchitecture, metric: Metric, percentile: int) -> tuple[float, ...]:
        """Milliseconds before correction, as sums over the parts of a model; the largest one counts."""
        if isinstance(self._predictor, Bent):
            return self._predictor.pieces(dense, metric, percentile)
        return (self._predictor.predict(dense, metric, percentile)[0],)

    def ratio(self, raw_ms: float, metric: Metric, percentile: int) -> float:
        """Measured / predicted near an uncorrected prediction of `raw_ms`."""
        if not self._measured:
            return 1.0
        points = self._points(metric, percentile)
        if raw_ms <= points[0][0]:
            return points[0][1]
        for (low_ms, low), (high_ms, high) in pairwise(points):
            if raw_ms <= high_ms:
                return low + (raw_ms - low_ms) / (high_ms - low_ms) * (high - low)
        return points[-1][1]

    def raw_limit(self, limit_ms: float, metric: Metric, percentile: int) -> float:
        """The uncorrected prediction that corresponds to a corrected one of `limit_ms`."""
        raw_ms = limit_ms
        for _ in range(30):
            raw_ms = limit_ms / self.ratio(raw_ms, metric, percentile)
        return raw_ms

    def _points(self, metric: Metric, percentile: int) -> list[tuple[float, float]]:
        """(predicted, measured / predicted) of groups of measured models, by increasing prediction."""
        key = (metric, percentile)
        if key not in self._ratios:
            pairs = []
            for dense, latency in self._measured.values():
                predicted_ms, _ = self._predictor.predict(dense, metric, percentile)
                pairs.append((predicted_ms, latency.of(metric, percentile) / predicted_ms))
            groups: list[list[tuple[float, float]]] = []
            for pair in sorted(pairs):
                if groups and pair[0] <= ALIKE * groups[-1][0][0]:
                    groups[-1].append(pair)
                else:
                    groups.append([pair])
            self._ratios[key] = [(fmean(ms for ms, _ in group), fmean(r for _, r in group)) for group in groups]
        return self._ratios[key]
