"""The tables against transformers' own rotary embedding, bit for bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import Phi3Config
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
from transformers.models.phi3.modeling_phi3 import Phi3RotaryEmbedding

from amoeba_export.formats.onnx.rope import TABULATED_TYPES, rope_table
from amoeba_export.ir import Rope
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


@pytest.mark.parametrize("kind", [kind for kind in TABULATED_TYPES if kind != "longrope"])
@pytest.mark.parametrize("theta", [10000.0, 1e6])
def test_tables_are_those_of_transformers(kind: str, theta: float) -> None:
    config = tiny_config("llama", rope_parameters={"rope_type": kind, "rope_theta": theta, **PARAMETERS[kind]})
    check(LlamaRotaryEmbedding(config), config, config.head_dim)


def test_a_part_of_a_head_has_frequencies_of_its_own() -> None:
    config = _config(rope_parameters={"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5})
    check(Phi3RotaryEmbedding(config), config, 8)


def check(theirs: Any, config: Any, dims: int) -> None:
    expected = theirs(torch.zeros(1), torch.arange(config.max_position_embeddings)[None])
    table = rope_table(_rope(config, dims), config.max_position_embeddings)
    for found, full in zip((table.cos, table.sin), expected, strict=True):
        torch.testing.assert_close(torch.from_numpy(found), full[0, :, : dims // 2], rtol=0, atol=0)


def test_longrope_has_rows_for_short_texts_before_those_for_long_ones() -> None:
    parameters = {
        "rope_type": "longrope",
        "rope_theta": 1e4,
        "short_factor": [1.0 + i / 8 for i in range(8)],
        "long_factor": [2.0 + i for i in range(8)],
        "original_max_position_embeddings": 32,
    }
    config = _config(rope_parameters=parameters, original_max_position_embeddings=32)
    theirs = Phi3RotaryEmbedding(config)
    table = rope_table(_rope(config, 16), config.max_position_embeddings)
    assert (table.num_short, len(table.cos)) == (32, 32 + config.max_position_embeddings)
    for rows, length in ((slice(0, 32), 32), (slice(32, None), config.max_position_embeddings)):
        expected = theirs(torch.zeros(1), torch.arange(length)[None])
        for found, full in zip((table.cos, table.sin), expected, strict=True):
            torch.testing.assert_close(torch.from_numpy(found[rows]), full[0, :, :8], rtol=0, atol=0)


def _config(**settings: Any) -> Any:
    """Heads of 16 dims."""
    return Phi3Config(hidden_size=64, num_attention_heads=4, max_position_embeddings=256, pad_token_id=0, **settings)


def _rope(config: Any, dims: int) -> Rope:
    scaling = dict(config.rope_parameters)
    theta = scaling.pop("rope_theta")
    scaling.pop("partial_rotary_factor", None)
    return Rope(theta=theta, scaling=None if scaling["rope_type"] == "default" else scaling, dims=dims)
