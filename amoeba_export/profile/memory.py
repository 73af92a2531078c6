"""What a cut model occupies while it runs: an estimate from dims alone, good enough to refuse what cannot fit."""

from __future__ import annotations

from amoeba_export.ir import DenseArchitecture, Workload
from amoeba_export.ir.dtype import DTYPES

MEBI = 2**20


def predict_memory_mb(dense: DenseArchitecture, *, weight_bytes: int, dtype: str, workload: Workload) -> float:
    """Weights, KV cache at the end of generation, and the largest activations of the prefill, in MiB.

    Quantized models keep the KV cache and the activations in fp32 here, as ONNX Runtime does on CPUs; other models keep
    everything in `dtype`. The runtime itself (tens of MiB) and the copies that some runtimes make while loading are not
    counted.

    Args:
        dense: The cut model.
        weight_bytes: What its container makes of the weights: `formats.sizes.weight_bytes`.
        dtype: The `--dtype`.
        workload: What it does.
    """
    base = dense.base
    kv_channels = sum(2 * layer.num_kv_heads * base.head_dim for layer in dense.layers)
    positions = workload.batch * (workload.prompt_tokens + workload.generate_tokens)
    widest_layer = max(3 * layer.ffn_size + layer.num_heads * base.head_dim for layer in dense.layers)
    prompt_positions = workload.batch * workload.prompt_tokens
    activations = prompt_positions * max(2 * base.hidden_size + widest_layer, base.vocab_size)
    return (weight_bytes + (positions * kv_channels + activations) * DTYPES[dtype].state_bytes) / MEBI
