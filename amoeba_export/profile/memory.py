"""What a cut model occupies while it runs: an estimate from dims alone, good enough to refuse what cannot fit."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from amoeba_export.ir import DenseArchitecture, Workload

MEBI = 2**20

BITS_PER_WEIGHT: Mapping[str, float] = MappingProxyType(
    {
        "fp32": 32.0,
        "fp16": 16.0,
        "bf16": 16.0,
        "int8": 9.0,  # 8 bits and an fp32 scale per block of 32 weights
        "int4": 5.0,  # 4 bits and an fp32 scale per block of 32 weights
    }
)
"""Of matrices, in memory."""


def predict_memory_mb(dense: DenseArchitecture, *, dtype: str, workload: Workload) -> float:
    """Weights, KV cache at the end of generation, and the largest activations of the prefill, in MiB.

    Quantized models keep the KV cache and the activations in fp32 here, as ONNX Runtime does on CPUs, and embedding and
    head in 8 bits, as the largest of our files do; other models keep everything in `dtype`. The runtime itself (tens
    of MiB) and the copies that some runtimes make while loading are not counted.
    """
    base = dense.base
    quantized = dtype in ("int8", "int4")
    plain_bytes = 4.0 if quantized else BITS_PER_WEIGHT[dtype] / 8
    embedding_params = base.vocab_size * base.hidden_size * (1 if base.tied_embeddings else 2)
    embedding_bits = BITS_PER_WEIGHT["int8" if quantized else dtype]
    layer_params = dense.num_params - embedding_params
    weights = (layer_params * BITS_PER_WEIGHT[dtype] + embedding_params * embedding_bits) / 8
    kv_channels = sum(2 * layer.num_kv_heads * base.head_dim for layer in dense.layers)
    positions = workload.batch * (workload.prompt_tokens + workload.generate_tokens)
    widest_layer = max(3 * layer.ffn_size + layer.num_heads * base.head_dim for layer in dense.layers)
    prompt_positions = workload.batch * workload.prompt_tokens
    activations = prompt_positions * max(2 * base.hidden_size + widest_layer, base.vocab_size)
    return (weights + (positions * kv_channels + activations) * plain_bytes) / MEBI
