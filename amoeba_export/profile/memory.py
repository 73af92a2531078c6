"""What a cut model occupies while it runs: an estimate from dims alone, good enough to refuse what cannot fit."""

from __future__ import annotations

from collections.abc import Collection

from amoeba_export.ir import DenseArchitecture, Workload
from amoeba_export.ir.dtype import DTYPES

MEBI = 2**20

_WHOLE_CACHE = frozenset({"onnx"})
"""Containers whose runtime keeps every token, in a window or not: ONNX Runtime's cache grows with the text."""

_STEP_TOKENS = 512
"""Tokens of a prompt that other runtimes take at once; they lie in the cache beside the window."""


def predict_memory_mb(
    dense: DenseArchitecture, *, weight_bytes: int, dtype: str, workload: Workload, formats: Collection[str] = ()
) -> float:
    """Weights, KV cache at the end of generation, and the largest activations of the prefill, in MiB.

    A layer with a window caches what lies in it and one step of the prompt, where the runtime drops the rest.

    Quantized models keep the KV cache and the activations in fp32 here, as ONNX Runtime does on CPUs; other models keep
    everything in `dtype`. The runtime itself (tens of MiB) and the copies that some runtimes make while loading are not
    counted.

    Args:
        dense: The cut model.
        weight_bytes: What its container makes of the weights: `formats.sizes.weight_bytes`.
        dtype: The `--dtype`.
        workload: What it does.
        formats: Containers that it is written in: the one that takes most counts.
    """
    base = dense.base
    positions = workload.prompt_tokens + workload.generate_tokens
    beside = positions if _WHOLE_CACHE & set(formats) else min(_STEP_TOKENS, workload.prompt_tokens)
    held = sum(
        layer.num_kv_heads * min(positions, int(dense.kind(layer).seen(positions)) + beside) for layer in dense.layers
    )
    cache = 2 * base.head_dim * held * workload.batch
    neurons = {layer: int(base.active_units(layer.ffn_size)) * base.unit_size for layer in dense.layers}
    widest_layer = max(3 * neurons[layer] + layer.num_heads * base.head_dim for layer in dense.layers)
    prompt_positions = workload.batch * workload.prompt_tokens
    activations = prompt_positions * max(2 * base.hidden_size + widest_layer, base.vocab_size)
    return (weight_bytes + (cache + activations) * DTYPES[dtype].state_bytes) / MEBI
