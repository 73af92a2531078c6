"""The tables against transformers' own rotary embedding, bit for bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from amoeba_export.formats.onnx.rope import TABULATED_TYPES, rope_tables
from tests.formats.onnx_model import architecture_of
from tests.tiny import tiny_config

PARAMETERS: dict[str, dict[str, Any]] = {
    "default": {},
    "linear": {"factor": 4.0},
    "llama3": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 64},
}


@pytest.mark.parametrize("kind", TABULATED_TYPES)
@pytest.mark.parametrize("theta", [10000.0, 1e6])
def test_tables_are_those_of_transformers(kind: str, theta: float) -> None:
    config = tiny_config("llama", rope_parameters={"rope_type": kind, "rope_theta": theta, **PARAMETERS[kind]})
    expected = LlamaRotaryEmbedding(config)(torch.zeros(1), torch.arange(config.max_position_embeddings)[None])
    half = config.head_dim // 2
    for table, full in zip(rope_tables(architecture_of(config)), expected, strict=True):
        torch.testing.assert_close(torch.from_numpy(table), full[0, :, :half], rtol=0, atol=0)
