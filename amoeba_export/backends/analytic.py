"""An estimate from a device's figures alone: bandwidth, compute, and what each token, block and layer costs besides.

decode = per_token + L * per_layer + max(bytes / (efficiency * bandwidth), flops / compute), and prefill alike with the
flops of the whole prompt. Bandwidth alone is not enough: it would promise six times the speed that a Jetson Orin Nano
reaches with a model of 135 M weights, since there the launches of a layer's kernels take longer than its weights do.
The shipped figures are fitted to published runs: `fitted.py`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated

from pydantic import Field

from amoeba_export.backends import ROUNDS, TIME_LIMIT_S, Availability, Subject
from amoeba_export.backends.targets import Strict, parse_options
from amoeba_export.errors import TargetError
from amoeba_export.formats.sizes import WeightBytes, weight_bytes
from amoeba_export.ir import SILENT, DenseArchitecture, Latency, Progress, Source, Target, Timing, Workload
from amoeba_export.quantities import percent

_Positive = Annotated[float, Field(gt=0)]


class Options(Strict):
    """The `[options]` table.

    Attributes:
        bandwidth_gb_s: Peak memory bandwidth.
        bandwidth_efficiency: The share of it that reading weights reaches.
        compute_tflops: Dense matrix multiplication that a prefill reaches (not the peak of a data sheet).
        per_layer_ms: Of launching one layer's work, half of it for attention and half for the FFN.
        per_token_ms: Of one step besides its layers.
        uncertainty: Relative half-width of the estimate. Of shipped targets, the worst leave-one-out error of the flow.
    """

    bandwidth_gb_s: _Positive
    bandwidth_efficiency: Annotated[float, Field(gt=0, le=1)]
    compute_tflops: _Positive
    per_layer_ms: Annotated[float, Field(ge=0)]
    per_token_ms: Annotated[float, Field(ge=0)] = 0.0
    uncertainty: Annotated[float, Field(gt=0, lt=1)]

    def in_words(self) -> dict[str, str]:
        """Each figure, for a reader."""
        token = f", and {self.per_token_ms:.3g} ms a token" if self.per_token_ms else ""
        reached = percent(self.bandwidth_efficiency)
        return {
            "bandwidth": f"{self.bandwidth_gb_s:g} GB/s, of which reading weights reaches {reached}",
            "compute": f"{self.compute_tflops:g} TFLOPS, which a prefill reaches",
            "overhead": f"{self.per_layer_ms:.3g} ms a layer{token}",
            "error": f"estimates may be off by {percent(self.uncertainty)} either way",
        }


source: Source = "analytic"
containers: tuple[str, ...] = ()
options_model = Options


def check(target: Target) -> Availability:
    """An estimate needs nothing but the target's figures."""
    parse_options(target)
    return Availability(ok=True)


def describe(target: Target) -> Mapping[str, str]:
    """The figures that the estimate rests on."""
    options = parse_options(target)
    return {"device": target.description, **{name: f"{value:g}" for name, value in options.model_dump().items()}}


def measure(
    subjects: Sequence[Subject],
    workload: Workload,
    *,
    target: Target,
    progress: Progress = SILENT,
    rounds: int = ROUNDS,
    time_limit_s: float = TIME_LIMIT_S,
) -> list[Latency | TargetError]:
    """Estimates. p90 equals p50: a formula does not scatter."""
    options = parse_options(target)
    device = describe(target)
    return [
        Latency(
            decode=_timing(estimate_ms(subject.dense, 1, workload, options, weights=weights)),
            prefill=_timing(estimate_ms(subject.dense, workload.prompt_tokens, workload, options, weights=weights)),
            source="analytic",
            workload=workload,
            device=device,
            uncertainty=options.uncertainty,
        )
        for subject in subjects
        for weights in (weight_bytes(subject.dense, target.formats, subject.dtype),)
    ]


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """What one step asks of a device.

    Attributes:
        layers: Two blocks count as one.
        memory_bytes: Read once: the weights, but for rows of embeddings and tables that no token needs, and the cache.
        flops: Of matrices and attention.
    """

    layers: float
    memory_bytes: float
    flops: float


def work_of(dense: DenseArchitecture, new_tokens: int, workload: Workload, *, weights: WeightBytes) -> Work:
    """One step with `new_tokens` tokens per row: 1 is decode at the full prompt, more is its prefill.

    Logits are computed for one position; the KV cache is 16 bits wide. A prefill computes the whole square of scores,
    not its causal half: with the half, published prefills of one device need twice the compute at 0.6 B that they need
    at 8 B. A layer with a window reads and computes no more than lies in it. Of experts, a token computes those that it
    goes through, and a step reads those that any of its tokens does.
    """
    base = dense.base
    head_params = base.head_params
    layer_params = dense.num_params - base.embedding_params - (head_params if base.has_own_head else 0)
    # Halfway through a prefill half of the prompt is in the cache; a decode step sees all of it.
    cached = workload.prompt_tokens if new_tokens == 1 else new_tokens / 2
    read = sum(layer.num_kv_heads * dense.kind(layer).seen(cached) for layer in dense.layers)
    cache_bytes = 4 * base.head_dim * read * workload.batch
    scores = workload.prompt_tokens if new_tokens == 1 else new_tokens
    attended = sum(layer.num_heads * dense.kind(layer).seen(scores) for layer in dense.layers)
    attention_flops = 4 * base.head_dim * attended * new_tokens
    active_params = layer_params - _idle_params(dense, 1)
    read_share = 1 - _idle_params(dense, new_tokens * workload.batch) / layer_params
    blocks = sum((layer.num_heads > 0) + (layer.ffn_size > 0) for layer in dense.layers)
    return Work(
        layers=blocks / 2,
        memory_bytes=weights.layers * read_share + weights.head + cache_bytes,
        flops=workload.batch * (2 * active_params * new_tokens + 2 * head_params + attention_flops),
    )


def _idle_params(dense: DenseArchitecture, tokens: float) -> float:
    """Weights of the experts that none of `tokens` goes through; the router is read for all."""
    base = dense.base
    idle = sum(layer.ffn_size - base.active_units(layer.ffn_size, tokens) for layer in dense.layers)
    return 3 * base.hidden_size * base.unit_size * idle


def estimate_ms(
    dense: DenseArchitecture, new_tokens: int, workload: Workload, options: Options, *, weights: WeightBytes
) -> float:
    """Milliseconds of the step that `work_of` describes."""
    work = work_of(dense, new_tokens, workload, weights=weights)
    memory_ms = work.memory_bytes / (options.bandwidth_efficiency * options.bandwidth_gb_s * 1e6)
    compute_ms = work.flops / (options.compute_tflops * 1e9)
    return options.per_token_ms + work.layers * options.per_layer_ms + max(memory_ms, compute_ms)


def _timing(milliseconds: float) -> Timing:
    return Timing(p50_ms=milliseconds, p90_ms=milliseconds, num_samples=0)
