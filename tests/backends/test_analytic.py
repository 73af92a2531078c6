from __future__ import annotations

import pytest

from amoeba_export.backends import Subject, measure_latency
from amoeba_export.backends.analytic import Options, estimate_ms
from amoeba_export.backends.targets import read_target
from amoeba_export.formats.sizes import WeightBytes, weight_bytes
from amoeba_export.ir import DenseArchitecture, Latency, LayerDims, Workload
from tests.backends.models import SMOLLM2

WORKLOAD = Workload(prompt_tokens=128, generate_tokens=128)
SMOLLM2_FULL = DenseArchitecture(base=SMOLLM2, layers=(SMOLLM2.layer_dims,) * 30)


def weights(dense: DenseArchitecture, dtype: str = "fp16") -> WeightBytes:
    return weight_bytes(dense, ("onnx",), dtype)


def device(*, bandwidth_gb_s: float, bandwidth_efficiency: float = 1, compute_tflops: float = 1000) -> Options:
    return Options(
        bandwidth_gb_s=bandwidth_gb_s,
        bandwidth_efficiency=bandwidth_efficiency,
        compute_tflops=compute_tflops,
        per_layer_ms=0.2,
        per_token_ms=1.0,
        uncertainty=0.5,
    )


def jetson(dense: DenseArchitecture, dtype: str, workload: Workload = WORKLOAD) -> Latency:
    (result,) = measure_latency([Subject(dense=dense, dtype=dtype)], workload, target=read_target("jetson"))
    assert isinstance(result, Latency)
    return result


def test_the_jetson_estimate_is_what_was_published() -> None:
    """SmolLM2-135M, 4 bits, llama.cpp on a Jetson Orin Nano Super at 25 W: 165.2 tokens per second."""
    latency = jetson(SMOLLM2_FULL, "int4")
    assert 1000 / latency.decode.p50_ms == pytest.approx(165.2, rel=0.06)
    assert latency.source == "analytic"
    assert latency.uncertainty == 0.3


def test_the_estimate_is_the_sum_of_its_parts() -> None:
    options = device(bandwidth_gb_s=100, bandwidth_efficiency=0.5)
    head = SMOLLM2.vocab_size * SMOLLM2.hidden_size
    layer_bytes = 2 * (SMOLLM2_FULL.num_params - head)
    cache_bytes = 30 * 4 * 3 * 64 * 128
    expected = 1.0 + 30 * 0.2 + (layer_bytes + 2 * head + cache_bytes) / 50e6
    assert estimate_ms(SMOLLM2_FULL, 1, WORKLOAD, options, weights=weights(SMOLLM2_FULL)) == pytest.approx(expected)


def test_a_missing_block_costs_half_a_layer_less_and_no_cache() -> None:
    options = device(bandwidth_gb_s=1e9, compute_tflops=1e9)
    no_attention = LayerDims(num_heads=0, num_kv_heads=0, ffn_size=1536)
    dense = DenseArchitecture(base=SMOLLM2, layers=(SMOLLM2.layer_dims, no_attention))
    assert estimate_ms(dense, 1, WORKLOAD, options, weights=weights(dense)) == pytest.approx(1.3, abs=1e-3)


def test_smaller_dtypes_and_shapes_are_faster_and_a_longer_prompt_slower() -> None:
    half = DenseArchitecture(base=SMOLLM2, layers=(SMOLLM2.layer_dims,) * 15)
    decode = [jetson(SMOLLM2_FULL, dtype).decode.p50_ms for dtype in ("fp32", "fp16", "int8", "int4")]
    assert decode == sorted(decode, reverse=True)
    assert jetson(half, "fp16").decode.p50_ms < decode[1]
    short, long = (jetson(half, "fp16", Workload(prompt_tokens=tokens)) for tokens in (128, 1024))
    assert short.decode.p50_ms < long.decode.p50_ms
    assert short.prefill.p50_ms < long.prefill.p50_ms


def test_a_head_of_some_tokens_is_read_in_place_of_the_whole() -> None:
    options = device(bandwidth_gb_s=100)
    whole = SMOLLM2_FULL
    small = DenseArchitecture(base=SMOLLM2.with_head(8192), layers=whole.layers)
    saved_bytes = 2 * (SMOLLM2.vocab_size - 8192) * SMOLLM2.hidden_size
    times = [estimate_ms(dense, 1, WORKLOAD, options, weights=weights(dense)) for dense in (whole, small)]
    assert times[0] - times[1] == pytest.approx(saved_bytes / 100e6)
    # The tied embedding stays: the file grows by the head.
    assert weights(small).total - weights(whole).total == 2 * 8192 * SMOLLM2.hidden_size
    assert small.num_params - whole.num_params == 8192 * SMOLLM2.hidden_size
