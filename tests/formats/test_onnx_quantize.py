"""The numbers of onnxruntime's own quantizer, and what a quantized graph computes."""

from __future__ import annotations

import dataclasses
import logging
import sys
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from onnxruntime.quantization.matmul_nbits_quantizer import (
    DefaultWeightOnlyQuantConfig,
    MatMulNBitsQuantizer,
)

from amoeba_export.formats.equalize import is_equalized
from amoeba_export.formats.onnx import quantize, weights
from amoeba_export.formats.onnx.precision import PRECISIONS, Blockwise
from amoeba_export.ir import DenseArchitecture, LayerDims
from tests.formats.onnx_model import OnnxDecoder, random_weights, subnet_of, torch_logits, write_onnx
from tests.formats.test_equalize import equalized
from tests.formats.test_onnx_values import adaptive, tokens

ENCODINGS = (Blockwise(8, 64), Blockwise(8, 32), Blockwise(4, 32))


def quantized_by_onnxruntime(w_OI: np.ndarray, encoding: Blockwise) -> tuple[np.ndarray, np.ndarray]:
    """A float MatMul taken through the public quantizer: packed weights and scales."""
    x = ir.val("x", dtype=ir.DataType.FLOAT, shape=["rows", w_OI.shape[1]])
    y = ir.val("y", dtype=ir.DataType.FLOAT, shape=["rows", w_OI.shape[0]])
    weight = ir.Value(name="w", const_value=ir.tensor(np.ascontiguousarray(w_OI.T), name="w"))
    node = ir.node("MatMul", [x, weight], outputs=[y], name="product")
    graph = ir.Graph([x], [y], nodes=[node], initializers=[weight], opset_imports={"": 21}, name="g")
    config = DefaultWeightOnlyQuantConfig(block_size=encoding.block_size, is_symmetric=True, bits=encoding.bits)
    quantizer = MatMulNBitsQuantizer(ir.to_proto(ir.Model(graph, ir_version=10)), algo_config=config)
    quantizer.process()
    tensors = {t.name: onnx.numpy_helper.to_array(t) for t in quantizer.model.model.graph.initializer}
    return tensors[f"w_Q{encoding.bits}"], tensors["w_scales"].reshape(len(w_OI), -1)


def dequantized(w_OI: torch.Tensor, encoding: Blockwise) -> torch.Tensor:
    return dequantize(quantize.quantize_rows(w_OI, encoding), encoding)[:, : w_OI.shape[1]]


def dequantize(quantized: quantize.Quantized, encoding: Blockwise) -> torch.Tensor:
    codes = quantized.packed if encoding.bits == 8 else halves(quantized.packed)
    values = (codes.astype(np.float32) - 2 ** (encoding.bits - 1)) * quantized.scales[..., None]
    return torch.from_numpy(values.reshape(len(values), -1).astype(np.float32))


def halves(packed: np.ndarray) -> np.ndarray:
    return np.stack([packed & 15, packed >> 4], -1).reshape(*packed.shape[:-1], -1)


@pytest.mark.parametrize("columns", [64, 96, 33, 100])
@pytest.mark.parametrize("encoding", ENCODINGS, ids=str)
def test_numbers_are_those_of_onnxruntime(encoding: Blockwise, columns: int) -> None:
    w_OI = np.random.default_rng(columns).standard_normal((48, columns)).astype(np.float32)
    w_OI[3] = 0  # a block without any weight has no scale to speak of
    expected_packed, expected_scales = quantized_by_onnxruntime(w_OI, encoding)
    quantized = quantize.quantize_rows(torch.from_numpy(w_OI), encoding)
    np.testing.assert_array_equal(quantized.packed, expected_packed)
    np.testing.assert_array_equal(quantized.scales, expected_scales)


def test_zeros_stay_zeros_and_the_last_block_may_be_short() -> None:
    w_OI = torch.rand(2, 70, generator=torch.Generator().manual_seed(3)) + 0.5
    w_OI[0] = 0
    encoding = Blockwise(4, 32)
    assert quantize.quantize_rows(w_OI, encoding).packed.shape == (2, 3, 16)
    values = dequantized(w_OI, encoding)
    assert not values[0].any()
    assert (values[1] - w_OI[1]).abs().max() <= 1.5 / 8  # a step; the greatest weight is at the end of the range


@pytest.mark.parametrize("dtype", ["int8", "int4"])
def test_stored_matrices_are_their_parts_quantized(dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Packed q, k and v, and weights that are written in many small chunks, are the parts quantized one by one."""
    monkeypatch.setattr(weights, "_CHUNK_BYTES", 1000)
    dense = adaptive(qkv_bias=True)
    source = random_weights(dense)
    folder = write_onnx(subnet_of(dense, source, tmp_path), tmp_path / "onnx", dtype=dtype)
    source = equalized(source) if is_equalized("onnx", dtype) else source
    stored = {t.name: onnx.numpy_helper.to_array(t) for t in onnx.load(folder / "model.onnx").graph.initializer}
    linear, head = PRECISIONS[dtype].linear, PRECISIONS[dtype].head
    assert linear and head
    packed_parts = {
        "model.layers.2.self_attn.q_k_v_proj": ("q_proj", "k_proj", "v_proj"),
        "model.layers.2.mlp.gate_proj": ("gate_proj",),
        "model.layers.2.mlp.down_proj": ("down_proj",),
        "lm_head": (),
    }
    for name, parts in packed_parts.items():
        encoding = linear if parts else head
        sources = [f"{name.rpartition('.')[0]}.{part}.weight" for part in parts] or ["lm_head.weight"]
        expected = quantize.quantize_rows(torch.cat([source[part] for part in sources]), encoding)
        np.testing.assert_array_equal(stored[f"{name}.weight_q{encoding.bits}"], expected.packed)
        np.testing.assert_array_equal(stored[f"{name}.weight_scales"], expected.scales)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", ["int8", "int4"])
def test_a_quantized_model_computes_with_its_dequantized_weights(dtype: str, tied: bool, tmp_path: Path) -> None:
    """What differs is that the kernels round activations to int8, too."""
    dense = adaptive(qkv_bias=True, tied_embeddings=tied)
    source = random_weights(dense)
    precision = PRECISIONS[dtype]
    assert precision.linear and precision.head
    reference = {
        name: dequantized(weight, precision.linear if "_proj" in name else precision.head)
        if weight.dim() == 2
        else weight
        for name, weight in (equalized(source) if is_equalized("onnx", dtype) else source).items()
    }
    ids = tokens(2, 9)
    expected = torch_logits(dense, reference, ids)
    decoder = OnnxDecoder(write_onnx(subnet_of(dense, source, tmp_path), tmp_path / "onnx", dtype=dtype))
    logits = torch.cat([decoder(ids[:, :6]), *(decoder(ids[:, i : i + 1]) for i in (6, 7, 8))], 1)
    assert (logits - expected).norm() < 0.03 * expected.norm()
    if dtype == "int4":
        exact = torch_logits(dense, source, ids)
        assert (logits - exact).norm() > 2 * (logits - expected).norm()


def test_a_hidden_size_that_no_block_divides_keeps_its_embedding_in_full(tmp_path: Path) -> None:
    base = adaptive().base
    dense = DenseArchitecture(
        base=dataclasses.replace(base, hidden_size=40),
        layers=(LayerDims(num_heads=2, num_kv_heads=1, ffn_size=50),),
    )
    source = random_weights(dense)
    folder = write_onnx(subnet_of(dense, source, tmp_path), tmp_path / "onnx", dtype="int8")
    stored = {t.name: onnx.numpy_helper.to_array(t) for t in onnx.load(folder / "model.onnx").graph.initializer}
    np.testing.assert_array_equal(stored["model.embed_tokens.weight"], source["model.embed_tokens.weight"].numpy())
    expected = torch_logits(dense, source, tokens(1, 5))
    assert (OnnxDecoder(folder)(tokens(1, 5)) - expected).norm() < 0.05 * expected.norm()


def test_onnxruntime_does_not_set_up_the_users_logs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its quantizer calls logging.basicConfig(level=INFO) when it is imported."""
    root = logging.getLogger()
    monkeypatch.setattr(root, "handlers", [])
    monkeypatch.setattr(root, "level", logging.WARNING)
    monkeypatch.delitem(sys.modules, "onnxruntime.quantization.matmul_nbits_quantizer")
    quantize.quantize_rows(torch.ones(2, 64), ENCODINGS[0])
    assert (root.handlers, root.level) == ([], logging.WARNING)
