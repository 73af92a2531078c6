"""OpenVINO runs the standard dialect, layers that differ included. (Of the other one it runs batches of 1.)"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.formats.onnx_model import OnnxDecoder, random_weights, subnet_of, torch_logits, write_onnx
from tests.formats.test_onnx_values import adaptive, tokens

openvino = pytest.importorskip("openvino")


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [("fp32", 1e-4), ("fp16", 0.1)],
)
def test_prefill_and_decode_agree_with_torch(dtype: str, tolerance: float, tmp_path: Path) -> None:
    dense = adaptive(qkv_bias=True, tied_embeddings=True)
    weights = random_weights(dense)
    folder = write_onnx(subnet_of(dense, weights, tmp_path), tmp_path / "onnx", dtype=dtype, dialect="standard")
    model = openvino.Core().compile_model(
        str(folder / "model.onnx"), "CPU", {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1}
    )
    ids = tokens(2, 6)
    expected = torch_logits(dense, weights, ids)
    past: dict[str, Any] = {
        item.any_name: np.zeros(
            (2, item.partial_shape[1].get_length(), 0, item.partial_shape[3].get_length()),
            item.element_type.to_dtype(),
        )
        for item in model.inputs
        if item.any_name.startswith("past_key_values")
    }
    for start, stop in ((0, 5), (5, 6)):
        feeds = {"input_ids": ids[:, start:stop].numpy(), "attention_mask": np.ones((2, stop), np.int64), **past}
        results = {name: value for key, value in model(feeds).items() for name in key.names}
        logits = torch.from_numpy(np.array(results.pop("logits"))).float()
        torch.testing.assert_close(logits, expected[:, start:stop], rtol=0, atol=tolerance)
        past = {name.replace("present", "past_key_values"): np.array(value) for name, value in results.items()}


@pytest.mark.parametrize("dtype", ["int8", "int4"])
def test_quantized_graphs_compute_what_they_do_in_onnxruntime(dtype: str, tmp_path: Path) -> None:
    """Of onnxruntime's operators, the scales of the gather and of the products are read alike."""
    dense = adaptive(tied_embeddings=True)
    folder = write_onnx(subnet_of(dense, random_weights(dense), tmp_path), tmp_path / "onnx", dtype=dtype)
    model = openvino.Core().compile_model(
        str(folder / "model.onnx"), "CPU", {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1}
    )
    ids = tokens(1, 6)
    feeds: dict[str, Any] = {"input_ids": ids.numpy(), "attention_mask": np.ones((1, 6), np.int64)}
    for item in model.inputs:
        if item.any_name.startswith("past_key_values"):
            heads, head_dim = item.partial_shape[1].get_length(), item.partial_shape[3].get_length()
            feeds[item.any_name] = np.zeros((1, heads, 0, head_dim), np.float32)
    results = {name: value for key, value in model(feeds).items() for name in key.names}
    expected = OnnxDecoder(folder)(ids)
    assert (torch.from_numpy(np.array(results["logits"])) - expected).norm() < 0.03 * expected.norm()
