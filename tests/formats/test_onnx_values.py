"""What the graphs compute: against transformers, and against the decoder written down in plain torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from amoeba_export.errors import NotRepresentable
from amoeba_export.formats import FORMATS
from amoeba_export.ir import Architecture, DenseArchitecture, LayerDims, SubnetPlan
from tests.formats.onnx_model import (
    OnnxDecoder,
    architecture_of,
    random_weights,
    subnet_of,
    torch_logits,
    write_onnx,
)
from tests.tiny import FAMILIES, VOCAB, tiny_model

DIALECTS = ("ort", "standard")
TOLERANCE = 5e-5


def export_model(model: Any, tmp_path: Path, **options: Any) -> OnnxDecoder:
    architecture = architecture_of(model.config)
    dense = SubnetPlan.full(architecture).dense(architecture)
    weights = {name: weight.detach() for name, weight in model.named_parameters()}
    return OnnxDecoder(write_onnx(subnet_of(dense, weights, tmp_path), tmp_path / "onnx", **options))


def tokens(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, VOCAB, shape, generator=torch.Generator().manual_seed(seed))


def close(actual: torch.Tensor, expected: torch.Tensor, tolerance: float = TOLERANCE) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_prefill_and_decode_agree_with_transformers(family: str, dialect: str, tmp_path: Path) -> None:
    model = tiny_model(family)
    ids = tokens(2, 9)
    with torch.no_grad():
        expected = model(input_ids=ids).logits
    decoder = export_model(model, tmp_path, dialect=dialect)
    close(decoder(ids), expected)
    decoder.reset()
    close(decoder(ids[:, :5]), expected[:, :5])
    for position in range(5, 9):
        close(decoder(ids[:, position : position + 1]), expected[:, position : position + 1])


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("head_dim", [2, 8, 16, 20, 22, 24, 80, 100, 120])
def test_any_head_dim_agrees_with_transformers(head_dim: int, dialect: str, tmp_path: Path) -> None:
    """onnxruntime's attention takes multiples of 16 alone (100 is OpenLLaMA's, 120 Danube's)."""
    sizes = {"head_dim": head_dim, "num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 64}
    model = tiny_model("mistral", **sizes)
    decoder = export_model(model, tmp_path, dialect=dialect)
    ids = tokens(2, 9)
    with torch.no_grad():
        expected = model(ids).logits
    close(decoder(ids[:, :6]), expected[:, :6])
    close(decoder(ids[:, 6:7]), expected[:, 6:7])
    close(decoder(ids[:, 7:8]), expected[:, 7:8])


@pytest.mark.parametrize("dtype", ["int8", "int4"])
@pytest.mark.parametrize("head_dim", [8, 100])
def test_heads_without_an_attention_of_onnxruntime_are_not_quantized(head_dim: int, dtype: str) -> None:
    dense = adaptive(head_dim=head_dim)
    with pytest.raises(NotRepresentable) as caught:
        FORMATS["onnx"].check(dense, dtype=dtype)
    assert str(caught.value) == (
        "ONNX cannot hold this plan: onnxruntime's attention takes heads of a multiple of 16, these have "
        f"{head_dim}, and without it there are no {dtype} weights.\n"
        f"  next:  Use one of: --dtype fp16, --dtype fp32, --format gguf --dtype {dtype}."
    )
    FORMATS["onnx"].check(dense, dtype="fp16")


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_left_padding_is_hidden_as_in_transformers(family: str, dialect: str, tmp_path: Path) -> None:
    model = tiny_model(family)
    ids, mask = tokens(3, 9), torch.ones(3, 9, dtype=torch.long)
    mask[0, :4] = 0
    mask[1, :1] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        expected = model(input_ids=ids, attention_mask=mask, position_ids=positions).logits
    decoder = export_model(model, tmp_path, dialect=dialect)
    real = mask[:, :7].bool()
    close(decoder(ids[:, :7], mask[:, :7])[real], expected[:, :7][real])
    for position in (7, 8):
        close(decoder(ids[:, position : position + 1], mask[:, : position + 1])[:, 0], expected[:, position])


@pytest.mark.parametrize("dialect", DIALECTS)
def test_a_left_padded_prompt_in_two_chunks(dialect: str, tmp_path: Path) -> None:
    """The padding ends inside the first chunk: the second has none, though the mask begins with zeros."""
    model = tiny_model("llama")
    ids, mask = tokens(1, 9), torch.ones(1, 9, dtype=torch.long)
    mask[0, :3] = 0
    with torch.no_grad():
        expected = model(input_ids=ids[:, 3:]).logits
    decoder = export_model(model, tmp_path, dialect=dialect)
    close(decoder(ids[:, :5], mask[:, :5])[:, 3:], expected[:, :2])
    close(decoder(ids[:, 5:], mask), expected[:, 2:])


def test_right_padding_is_hidden_the_way_of_onnxruntime_genai(tmp_path: Path) -> None:
    """Its runtime pads prompts at the right, and later puts a 1 behind the padding of a row for each new token."""
    model = tiny_model("llama")
    ids, mask = tokens(2, 6), torch.ones(2, 6, dtype=torch.long)
    mask[1, 4:] = 0
    next_ids = tokens(2, 1, seed=1)
    with torch.no_grad():
        whole = model(input_ids=torch.cat([ids[:1], next_ids[:1]], 1)).logits
        short = model(input_ids=torch.cat([ids[1:, :4], next_ids[1:]], 1)).logits
    decoder = export_model(model, tmp_path)
    prompt = decoder(ids, mask)
    close(prompt[0], whole[0, :6])
    close(prompt[1, :4], short[0, :4])
    step = decoder(next_ids, torch.cat([mask, torch.ones(2, 1, dtype=torch.long)], 1))
    close(step[0, 0], whole[0, 6])
    close(step[1, 0], short[0, 4])


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "linear", "factor": 4.0},
        {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
    ],
    ids=lambda rope: rope["rope_type"],
)
def test_scaled_rope_agrees_with_transformers(rope: dict[str, Any], dialect: str, tmp_path: Path) -> None:
    model = tiny_model("llama", rope_parameters={**rope, "rope_theta": 5000.0})
    ids = tokens(1, 100)
    with torch.no_grad():
        expected = model(input_ids=ids).logits
    close(export_model(model, tmp_path, dialect=dialect)(ids), expected)


@pytest.mark.parametrize("dialect", DIALECTS)
def test_a_sliding_window_agrees_with_transformers(dialect: str, tmp_path: Path) -> None:
    model = tiny_model("mistral", sliding_window=4)
    ids = tokens(1, 12)
    with torch.no_grad():
        expected = model(input_ids=ids).logits
        unlimited = tiny_model("mistral")(input_ids=ids).logits
    assert (expected - unlimited).abs().max() > 0.1
    decoder = export_model(model, tmp_path, dialect=dialect)
    close(decoder(ids[:, :8]), expected[:, :8])
    for position in range(8, 12):
        close(decoder(ids[:, position : position + 1])[:, 0], expected[:, position])


def adaptive(**overrides: Any) -> DenseArchitecture:
    """Layers of every kind: full, cut, without attention or FFN, with and without the bias of what is gone."""
    settings: dict[str, Any] = {
        "family": "llama",
        "num_layers": 8,
        "hidden_size": 64,
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 32,
        "ffn_size": 96,
        "vocab_size": VOCAB,
        "max_positions": 64,
        "norm_eps": 1e-5,
        "rope_theta": 10000.0,
    }
    biases = {"o_bias": True, "down_bias": True}
    qkv = overrides.get("qkv_bias", False)
    widths: list[dict[str, Any]] = [
        {"num_heads": 0, "num_kv_heads": 0, "ffn_size": 40},
        {"num_heads": 4, "num_kv_heads": 2, "ffn_size": 96, "gate_up_bias": True},
        {"num_heads": 2, "num_kv_heads": 1, "ffn_size": 33, **biases},
        {"num_heads": 0, "num_kv_heads": 0, "ffn_size": 17, **biases},
        {"num_heads": 2, "num_kv_heads": 2, "ffn_size": 0, **biases},
        {"num_heads": 1, "num_kv_heads": 1, "ffn_size": 0},
        {"num_heads": 0, "num_kv_heads": 0, "ffn_size": 0, **biases},
        {"num_heads": 3, "num_kv_heads": 1, "ffn_size": 64, "down_bias": True},
        {"num_heads": 0, "num_kv_heads": 0, "ffn_size": 0},
    ]
    return DenseArchitecture(
        base=Architecture(**(settings | overrides)),
        layers=tuple(LayerDims(**width, qkv_bias=qkv and width["num_heads"] > 0) for width in widths),
    )


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize(
    "overrides", [{}, {"qk_norm": True, "family": "qwen3"}, {"qkv_bias": True, "tied_embeddings": True}], ids=str
)
def test_layers_may_differ_in_everything(overrides: dict[str, Any], dialect: str, tmp_path: Path) -> None:
    dense = adaptive(**overrides)
    weights = random_weights(dense)
    decoder = OnnxDecoder(write_onnx(subnet_of(dense, weights, tmp_path), tmp_path / "onnx", dialect=dialect))
    ids = tokens(2, 9)
    expected = torch_logits(dense, weights, ids)
    close(decoder(ids[:, :7]), expected[:, :7])
    for position in (7, 8):
        close(decoder(ids[:, position : position + 1]), expected[:, position : position + 1])
    caches = [name for name in decoder.input_names if name.endswith(".key")]
    assert caches == [f"past_key_values.{i}.key" for i in range(5)]  # only layers that have attention


def test_a_model_without_attention_still_runs(tmp_path: Path) -> None:
    base = adaptive().base
    dense = DenseArchitecture(base=base, layers=(LayerDims(num_heads=0, num_kv_heads=0, ffn_size=24, o_bias=True),))
    weights = random_weights(dense)
    decoder = OnnxDecoder(write_onnx(subnet_of(dense, weights, tmp_path), tmp_path / "onnx"))
    ids = tokens(1, 4)
    close(decoder(ids), torch_logits(dense, weights, ids))


@pytest.mark.parametrize("dialect", DIALECTS)
def test_last_logits_are_those_of_the_last_position(dialect: str, tmp_path: Path) -> None:
    model = tiny_model("llama")
    ids = tokens(2, 6)
    with torch.no_grad():
        expected = model(input_ids=ids).logits[:, -1:]
    close(export_model(model, tmp_path, dialect=dialect, last_logits=True)(ids), expected)


@pytest.mark.parametrize("dialect", DIALECTS)
def test_fp16_stays_near_fp32(dialect: str, tmp_path: Path) -> None:
    model = tiny_model("llama")
    ids = tokens(2, 6)
    with torch.no_grad():
        expected = model(input_ids=ids).logits
    close(export_model(model, tmp_path, dtype="fp16", dialect=dialect)(ids), expected, 0.05)
