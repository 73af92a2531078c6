"""What a manifest records: a shape, its latency, its quality against the full model, how it was fitted and verified."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field

from amoeba_export.ir import Metric, RoundingHow, Shape, Source, SubnetPlan, Workload
from amoeba_export.quantities import percent


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerCounts:
    """How much one kept layer keeps: counts. `plan.json` has the indices.

    Attributes:
        source_layer: Index of the layer in the supernet.
        query_heads: Number of query heads.
        kv_heads: Number of KV heads.
        ffn: Number of FFN units: neurons or experts.
    """

    source_layer: int
    query_heads: int
    kv_heads: int
    ffn: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ShapeRecord:
    """The shape that was built.

    Attributes:
        depth: Number of layers.
        width: Share of its prunable weights that a layer keeps.
        layers: The kept layers, the first one first.
    """

    depth: int
    width: float
    layers: tuple[LayerCounts, ...]

    @classmethod
    def of(cls, plan: SubnetPlan) -> ShapeRecord:
        """The counts of `plan`."""
        return cls(
            depth=plan.shape.depth,
            width=plan.shape.width,
            layers=tuple(
                LayerCounts(
                    source_layer=layer.source_layer,
                    query_heads=len(layer.query_heads),
                    kv_heads=len(layer.kv_heads),
                    ffn=len(layer.ffn),
                )
                for layer in plan.layers
            ),
        )

    @property
    def shape(self) -> Shape:
        """Depth and width alone."""
        return Shape(self.depth, self.width)


@dataclass(frozen=True, slots=True, kw_only=True)
class LatencyRecord:
    """The budget, what the cost model promised, and what the target said of the files in this artifact.

    Attributes:
        metric: The latency that the budget limits.
        percentile: The percentile that the budget limits.
        budget_ms: The budget in milliseconds; None for a given shape without a budget.
        predicted_ms: The predicted latency; None without a prediction.
        measured_ms: `p50` and `p90` of `metric` in milliseconds; None if the latency is an estimate.
        source: `measured`, or the kind of estimate.
        target: The target's name.
        workload: The workload that latencies are measured with.
        uncertainty: Relative half-width of the prediction.
        full_dtype: Precision of the full model that a budget in percent refers to; None without a search.
        device: The backend's description of the measured device.
    """

    metric: Metric
    percentile: int = 50
    budget_ms: float | None
    predicted_ms: float | None
    measured_ms: Mapping[str, float] | None
    source: Source
    target: str
    workload: Workload
    uncertainty: float | None = None
    full_dtype: str | None = None
    device: Mapping[str, str] = field(default_factory=dict)

    @property
    def is_estimate(self) -> bool:
        """Whether the target itself was never asked."""
        return self.source != "measured"

    @property
    def actual_ms(self) -> float | None:
        """What counts against the budget: the measured percentile, or the estimate where there is none."""
        return self.measured_ms[f"p{self.percentile}"] if self.measured_ms else self.predicted_ms


@dataclass(frozen=True, slots=True, kw_only=True)
class FullModelRecord:
    """What the uncut model would give in one precision: what the artifact is to be compared with.

    Attributes:
        dtype: The precision.
        latency_ms: Latency, in the metric and at the percentile of the artifact's `latency`. In a manifest, as
            fast as in the run that measured the artifact: scaled by what the full model took before and then.
        source: `measured` (on a graph with these dims), or the kind of estimate of `latency_ms`.
        quality: In the metric of the artifact's `quality`, with the rise from rounding; None if it is not known.
        keeps_budget: Whether it keeps every budget; None without a budget.
        rounding: How the integers behind `quality` were chosen; None if the precision has no integers chosen with data.
    """

    dtype: str
    latency_ms: float
    source: Source
    quality: Mapping[str, float] | None = None
    keeps_budget: bool | None = None
    rounding: RoundingHow | None = None

    @property
    def rounding_words(self) -> str:
        """How it was rounded, where there are two ways; else empty."""
        return {"data": "rounded with data", "nearest": "rounded to nearest", None: ""}[self.rounding]


@dataclass(frozen=True, slots=True, kw_only=True)
class VerificationRecord:
    """The files, re-opened from disk, against the masked supernet: the worst of all formats.

    Attributes:
        max_abs_diff: Largest absolute difference of a logit.
        max_rel_diff: The same, relative to the largest logit.
        greedy_tokens_equal: Whether the greedy tokens are those of the masked supernet.
        mean_kl: KL divergence of quantized formats from the same shape unquantized, in nats per token. None, and not
            in the JSON, if nothing is quantized.
        perplexity_ratio: Their perplexity divided by that of the shape unquantized. None, and not in the JSON, if
            nothing is quantized.
    """

    max_abs_diff: float
    max_rel_diff: float
    greedy_tokens_equal: bool
    mean_kl: float | None = None
    perplexity_ratio: float | None = None

    def to_json(self) -> dict[str, float | bool]:
        """The figures that there are."""
        return {key: value for key, value in dataclasses.asdict(self).items() if value is not None}


@dataclass(frozen=True, slots=True, kw_only=True)
class ContinuationRecord:
    """How the files of one format go on after a text, so that another runtime can be asked the same.

    Attributes:
        format: The format of the files.
        prompt: Tokens of the text.
        tokens: The next tokens, by greedy decoding through the KV cache.
    """

    format: str
    prompt: tuple[int, ...]
    tokens: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class VocabularyRecord:
    """A head that computes logits of some tokens, and what that costs. `plan.json` has the tokens.

    Attributes:
        tokens: Number of tokens that have logits.
        of: Number of tokens of the model.
        text: The text of the figures below. It did not choose the tokens. Text and figures are None without a
            tokenizer.
        num_tokens: Number of predicted tokens of this text.
        unwritable: Share of these tokens that are not kept: the model can never write them.
        loss: Mean loss on the other tokens, in nats, by the probabilities among the kept tokens.
        loss_of_all_tokens: The same by the probabilities among all tokens, as with the whole head.
    """

    tokens: int
    of: int
    text: str | None = None
    num_tokens: int | None = None
    unwritable: float | None = None
    loss: float | None = None
    loss_of_all_tokens: float | None = None

    @property
    def words(self) -> str:
        """In one line."""
        text = f"logits of {self.tokens:,} of {self.of:,} tokens"
        if self.unwritable is not None:
            text += f"; {percent(self.unwritable)} of the tokens of '{self.text}' cannot be written"
        if self.loss is not None:
            text += f", loss of the others {self.loss:.3f} ({self.loss_of_all_tokens:.3f} among all tokens)"
        return text


@dataclass(frozen=True, slots=True, kw_only=True)
class RefitRecord:
    """How the weights were fitted after the cut.

    Attributes:
        kind: `refit` by least squares, `heal` by distillation from there.
        sha256: Of the file with the fitted weights.
        losses: Text -> `full`, `cut` (before it was fitted) and `refit`: nats per token on tokens that nothing was
            fitted on. `mix` is of the texts that were fitted, the others are from other sources.
    """

    kind: str
    sha256: str
    losses: Mapping[str, Mapping[str, float]]
