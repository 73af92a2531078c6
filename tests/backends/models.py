"""Dims to measure: tiny, and SmolLM2-135M's for formulas."""

from __future__ import annotations

from amoeba_export.backends import Subject
from amoeba_export.ir import Architecture, DenseArchitecture, LayerDims, Workload
from tests.tiny import VOCAB, tiny_config

TINY = Architecture(
    family="llama",
    num_layers=4,
    hidden_size=96,
    num_heads=6,
    num_kv_heads=3,
    head_dim=32,
    ffn_size=96,
    vocab_size=VOCAB,
    max_positions=256,
    norm_eps=1e-6,
    rope_theta=10000.0,
    tied_embeddings=True,
    config=tiny_config("llama").to_dict(),
)
SMOLLM2 = Architecture(
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
    rope_theta=100000.0,
    tied_embeddings=True,
)
SHORT = Workload(prompt_tokens=8, generate_tokens=8)

FULL = Subject(dense=DenseArchitecture(base=TINY, layers=(TINY.layer_dims,) * 4), label="full")
MIXED = Subject(
    dense=DenseArchitecture(
        base=TINY,
        layers=(
            TINY.layer_dims,
            LayerDims(num_heads=2, num_kv_heads=1, ffn_size=32, o_bias=True, down_bias=True),
            LayerDims(num_heads=0, num_kv_heads=0, ffn_size=48),
        ),
    ),
    label="mixed",
)
