"""llama.cpp times GGUF artifacts and bare dims, layers that differ included: by its wheel, or by a `llama-bench`."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest

from amoeba_export.backends import Subject, find_backend, measure_latency
from amoeba_export.backends.graphs import prepare_gguf
from amoeba_export.backends.llamacpp import Options
from amoeba_export.backends.runner.weights import write_weights
from amoeba_export.errors import TargetError, TargetUnavailable
from amoeba_export.gguf_file import open_gguf
from amoeba_export.ir import DenseArchitecture, Latency, Target, Workload
from amoeba_export.materialize import materialize_subnet
from tests.backends import llama_bench
from tests.backends.models import FULL, MIXED, SHORT, TINY
from tests.formats.bpe import save_bpe
from tests.materialize.subnets import open_supernet, plan_for, write
from tests.tiny import save_tiny

TARGET = Target(name="some-llamacpp", description="a target", backend="llamacpp", options={"threads": 1})


@pytest.fixture(scope="module")
def subject(tmp_path_factory: pytest.TempPathFactory) -> Subject:
    folder = save_tiny(tmp_path_factory.mktemp("llamacpp") / "model")
    save_bpe(folder)
    supernet = open_supernet(folder)
    plan = plan_for(supernet, "3x0.5", "adaptive")
    write(materialize_subnet(supernet, plan), folder.parent / "artifact" / "gguf", "gguf", "fp16")
    dense = plan.dense(supernet.architecture)
    return Subject(dense=dense, artifact=folder.parent / "artifact", dtype="fp16", label="cut")


def test_an_artifact_is_timed(subject: Subject) -> None:
    pytest.importorskip("xllamacpp")
    (result,) = measure_latency([subject], SHORT, target=TARGET, rounds=1)
    assert isinstance(result, Latency), result
    assert result.source == "measured"
    assert 0 < result.decode.p50_ms <= result.decode.p90_ms
    assert 0 < result.prefill.p50_ms <= result.prefill.p90_ms


def test_several_sequences_are_its_subjects_error(subject: Subject) -> None:
    pytest.importorskip("xllamacpp")
    batch = Workload(prompt_tokens=8, generate_tokens=8, batch=2)
    (result,) = measure_latency([subject], batch, target=TARGET, rounds=1)
    assert isinstance(result, TargetError)
    assert "llama.cpp is timed with one sequence; use --batch 1" in str(result)


LLAMA3 = dataclasses.replace(
    TINY,
    rope_scaling={
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
)


@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16", "int8", "int4"])
def test_dims_alone_make_a_file_of_ordinary_numbers(dtype: str, tmp_path: Path) -> None:
    """No infinite scale and no denormal number in it: both would change a processor's speed."""
    dense = DenseArchitecture(base=LLAMA3, layers=(LLAMA3.layer_dims, *MIXED.dense.layers[1:]))
    prepared = prepare_gguf(Subject(dense=dense, dtype=dtype), tmp_path, Options())
    weights = prepared["weights"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["header.gguf"]
    write_weights(str(tmp_path / weights["file"]), weights["regions"], head=str(tmp_path / weights["head"]))
    opened = open_gguf(tmp_path / "model.gguf")
    assert opened.fields["general.architecture"] == "deci"
    assert opened.fields["deci.attention.head_count"] == [6, 2, 0]
    assert len(opened.fields["tokenizer.ggml.tokens"]) == TINY.vocab_size
    for name, tensor in opened.tensors.items():
        values = tensor.read()
        assert np.isfinite(values).all(), name
        assert 0.002 < np.abs(values).mean() < 2, name
        assert name == "rope_freqs.weight" or values.std() > 0.003, name
    np.testing.assert_array_equal(opened.tensors["rope_freqs.weight"].read(), 1.0)
    kinds = {tensor.kind for name, tensor in opened.tensors.items() if len(tensor.shape) > 1}
    assert kinds <= {
        *{"fp32": {gguf.GGMLQuantizationType.F32}, "fp16": {gguf.GGMLQuantizationType.F16}}.get(dtype, set()),
        *{"bf16": {gguf.GGMLQuantizationType.BF16}, "int8": {gguf.GGMLQuantizationType.Q8_0}}.get(dtype, set()),
        *({gguf.GGMLQuantizationType.Q4_0, gguf.GGMLQuantizationType.Q8_0} if dtype == "int4" else set()),
    }


def test_a_cut_that_llama_cpp_cannot_hold_is_its_subjects_error_alone() -> None:
    pytest.importorskip("xllamacpp")
    normed = dataclasses.replace(TINY, family="qwen3", qk_norm=True)
    mixed = dataclasses.replace(MIXED, dense=DenseArchitecture(base=normed, layers=MIXED.dense.layers))
    refused, timed = measure_latency([mixed, FULL], SHORT, target=TARGET, rounds=1)
    assert isinstance(refused, TargetError)
    assert "llama.cpp has no per-layer widths together with QK norms" in refused.what
    assert isinstance(timed, Latency), timed


@pytest.fixture
def bench(tmp_path: Path) -> Target:
    """A target whose `llama-bench` is a stand-in."""
    program = tmp_path / "llama-bench"
    program.write_text(f"#!/bin/sh\nexec '{sys.executable}' '{llama_bench.__file__}' \"$@\"\n")
    program.chmod(0o755)
    return dataclasses.replace(TARGET, name="board", options={"binary": str(program), "gpu_layers": 999})


def test_llama_bench_times_an_artifact(bench: Target, subject: Subject) -> None:
    """A token at depth d takes (d + 1) times a token without: the mean of 8 tokens is asked for around the prompt."""
    assert subject.artifact is not None
    ns = llama_bench.token_ns(subject.artifact / "gguf" / "model.gguf")
    (result,) = measure_latency([subject], SHORT, target=bench, rounds=2)
    assert isinstance(result, Latency), result
    assert result.decode.p50_ms == pytest.approx(ns * (8 + 4) / 8 / 1e6, rel=1e-3)
    assert result.prefill.p50_ms == pytest.approx(ns * 8 / 1e6, rel=1e-3)
    assert result.memory_mb is not None
    assert result.memory_mb > 1
    assert result.device["provider"] == "GPU"
    assert result.device["runtime"].startswith("llama-bench ")
    assert result.device["devices"] == "CUDA0: Orin (62840 MiB, 50000 MiB free)"


def test_llama_bench_times_bare_dims(bench: Target) -> None:
    results = measure_latency([FULL, MIXED], SHORT, target=bench, rounds=1)
    times = [result.decode.p50_ms for result in results if isinstance(result, Latency)]
    assert len(times) == 2
    assert times[0] > times[1] > 0


@pytest.mark.parametrize(
    ("behaviour", "reason"),
    [
        ("fail", "llama-bench ended with code 1: main: error: failed to load model"),
        ("crash", "llama-bench crashed with signal 6: CUDA error: no kernel image is available for execution"),
        ("garbage", "llama-bench printed no figures of {'n_prompt': 0, 'n_gen': 8, 'n_depth': 4}: '[{not json"),
        ("zero", "llama-bench says that {'n_prompt': 0, 'n_gen': 8, 'n_depth': 4} took [0.0"),
    ],
)
def test_a_llama_bench_that_fails_is_its_subjects_error(
    behaviour: str, reason: str, bench: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LLAMA_BENCH", behaviour)
    (result,) = measure_latency([FULL], SHORT, target=bench, rounds=1)
    assert isinstance(result, TargetError)
    assert reason in result.what


def test_a_runtime_for_other_gpus_is_said_with_what_to_do(bench: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    """That a provider is listed says nothing: an inference has to be tried."""
    monkeypatch.setenv("LLAMA_BENCH", "crash")
    (result,) = measure_latency([FULL], SHORT, target=bench, rounds=1)
    assert isinstance(result, TargetError)
    assert str(result.next_step).startswith("The runtime was built for other GPUs than this one: build it for the")


def test_a_llama_bench_that_is_not_there_is_said_with_the_way_to_get_it() -> None:
    target = dataclasses.replace(TARGET, options={"binary": "/nowhere/llama-bench"})
    with pytest.raises(TargetUnavailable, match="there is no program '/nowhere/llama-bench'") as caught:
        measure_latency([FULL], SHORT, target=target)
    assert "cmake --build build --target llama-bench" in str(caught.value.next_step)


def test_another_program_is_not_taken_for_llama_bench(bench: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLAMA_BENCH", "other")
    target = dataclasses.replace(bench, options={**bench.options, "threads": 3})  # described once per options
    found = find_backend("llamacpp").check(target)
    assert "does not answer as llama-bench does (error: unknown argument)" in found.reason
