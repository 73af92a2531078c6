"""A machine whose latencies follow a known rule: what the cost model is tested against."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field

import numpy as np

from amoeba_export.ir import Architecture, DenseArchitecture, Latency, LayerDims, Timing, Workload

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
    tied_embeddings=True,
)


def dense(*layers: tuple[int, int, int], base: Architecture = SMOL) -> DenseArchitecture:
    """A cut model from (heads, KV heads, neurons) of each layer."""
    return DenseArchitecture(
        base=base,
        layers=tuple(LayerDims(num_heads=q, num_kv_heads=kv, ffn_size=ffn) for q, kv, ffn in layers),
    )


def random_dense(rng: np.random.Generator, base: Architecture = SMOL) -> DenseArchitecture:
    """A cut with random depth and, in every other case, widths that differ from layer to layer."""
    depth = int(rng.integers(base.num_layers // 2, base.num_layers + 1))
    uniform = rng.random() < 0.5
    layers = []
    for _ in range(depth):
        groups = int(rng.integers(0 if not uniform else 1, base.num_kv_heads + 1))
        layers.append((groups * base.heads_per_kv, groups, int(rng.integers(base.ffn_size // 4, base.ffn_size + 1))))
    return dense(*([layers[0]] * depth if uniform else layers), base=base)


@dataclass
class Machine:
    """Additive costs in milliseconds per head, neuron, block, cached token; optional relative noise and a knee."""

    base_ms: float = 3.0
    attention_ms: float = 0.04
    ffn_ms: float = 0.03
    head_ms: float = 0.012
    kv_head_ms: float = 0.011
    kv_token_ms: float = 0.00002
    neuron_ms: float = 0.0003
    noise: float = 0.0
    knee: float = 0.0
    beyond_ms: float = 0.0
    tail: float = 1.05
    rng: np.random.Generator = field(default_factory=lambda: np.random.default_rng(0))

    def decode_ms(self, model: DenseArchitecture, tokens: int) -> float:
        total = self.base_ms
        for layer in model.layers:
            total += self.attention_ms * (layer.num_heads > 0) + self.ffn_ms * (layer.ffn_size > 0)
            total += self.head_ms * layer.num_heads + self.neuron_ms * layer.ffn_size
            total += layer.num_kv_heads * (self.kv_head_ms + self.kv_token_ms * tokens)
        weights = sum(model.base.prunable_params(layer) for layer in model.layers) / 1e6
        return total + self.beyond_ms * max(0.0, weights - self.knee)

    def measure(self, model: DenseArchitecture, workload: Workload | None = None) -> Latency:
        workload = workload or Workload()
        token_ms = self.decode_ms(model, workload.prompt_tokens) * (1 + self.noise * self.rng.standard_normal())
        sums = dataclasses.replace(self, beyond_ms=0.0).decode_ms(model, 0)
        prefill_ms = 7.0 + 0.3 * workload.prompt_tokens * (sums - self.base_ms)
        prefill_ms *= 1 + self.noise * self.rng.standard_normal()
        return Latency(
            decode=Timing(p50_ms=token_ms, p90_ms=self.tail * token_ms, num_samples=20),
            prefill=Timing(p50_ms=prefill_ms, p90_ms=self.tail * prefill_ms, num_samples=5),
            source="measured",
            workload=workload,
            device={"cpu": "imaginary", "threads": "2"},
        )
