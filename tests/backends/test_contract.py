"""What every backend promises, whatever it is: one test per promise, all backends through each."""

from __future__ import annotations

import dataclasses
import importlib.util
from pathlib import Path

import pytest

from amoeba_export.backends import BACKENDS, Subject, find_backend, measure_latency
from amoeba_export.backends.targets import parse_options, read_target
from amoeba_export.errors import InputError, TargetError, TargetUnavailable
from amoeba_export.ir import DenseArchitecture, Latency, LayerDims, Target, Workload
from amoeba_export.profile import design_graphs, fit_cost_table, write_table
from tests.backends.models import FULL, MIXED, SHORT, SMOLLM2, TINY

RUNTIMES = {
    "onnxruntime": "onnxruntime",
    "genai": "onnxruntime_genai",
    "openvino": "openvino",
    "torch": "torch",
    "llamacpp": "xllamacpp",
}
BAD_OPTIONS = {name: {"thread": 1} for name in RUNTIMES} | {
    "analytic": {"bandwidth": 1},
    "recorded": {"tables": "x.json"},
    "ssh": {"hosts": "me@board"},
    "command": {"runs": ["bench"]},
}


@pytest.fixture(scope="session")
def recorded_table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cost table of the tiny model. Its measurements are the analytic Jetson's, called measured."""
    path = tmp_path_factory.mktemp("table") / "table.json"
    graphs = design_graphs(TINY, num_graphs=12)
    subjects = [Subject(dense=graph, dtype="fp32") for graph in graphs]
    results = measure_latency(subjects, SHORT, target=read_target("jetson"))
    measured = [
        (graph, dataclasses.replace(result, source="measured"))
        for graph, result in zip(graphs, results, strict=True)
        if isinstance(result, Latency)
    ]
    write_table(fit_cost_table(measured, target="board", dtype="fp32"), path)
    return path


def target_of(backend: str, recorded_table: Path) -> Target:
    if backend in RUNTIMES and importlib.util.find_spec(RUNTIMES[backend]) is None:
        pytest.skip(f"{RUNTIMES[backend]} is not installed")
    options: dict[str, object] = {}
    if backend == "analytic":
        options = dict(read_target("jetson").options)
    if backend == "recorded":
        options = {"table": str(recorded_table)}
    if backend in RUNTIMES:
        options = {"threads": 1}
    return Target(name=f"some-{backend}", description="a target", backend=backend, options=options)


def test_the_lists_here_name_every_backend() -> None:
    assert set(BAD_OPTIONS) == set(BACKENDS)


@pytest.mark.parametrize("backend", [*RUNTIMES, "analytic", "recorded"])
def test_an_available_backend_describes_its_device_the_same_way_twice(backend: str, recorded_table: Path) -> None:
    target = target_of(backend, recorded_table)
    found = find_backend(backend)
    assert found.check(target).ok
    device = found.describe(target)
    assert device
    assert all(isinstance(key, str) and isinstance(value, str) for key, value in device.items())
    assert device == found.describe(target)


@pytest.mark.parametrize("backend", [*RUNTIMES, "analytic", "recorded"])
def test_each_subject_has_its_result_in_order(backend: str, recorded_table: Path) -> None:
    target = target_of(backend, recorded_table)
    results = measure_latency([FULL, MIXED], SHORT, target=target, rounds=1)
    for result in results:
        assert isinstance(result, Latency), result
        assert result.source == ("measured" if backend in RUNTIMES else find_backend(backend).source)
        assert result.workload == SHORT
        assert 0 < result.decode.p50_ms <= result.decode.p90_ms
        assert 0 < result.prefill.p50_ms <= result.prefill.p90_ms
        assert (result.uncertainty is None) == (result.source == "measured")
        assert (result.decode.num_samples > 0) == (result.source == "measured")


@pytest.mark.parametrize("dtype", ["int8", "int4"])
@pytest.mark.parametrize("backend", ["onnxruntime", "genai", "openvino", "llamacpp"])
def test_quantized_graphs_run(backend: str, dtype: str, recorded_table: Path) -> None:
    subject = dataclasses.replace(MIXED, dtype=dtype)
    (result,) = measure_latency([subject], SHORT, target=target_of(backend, recorded_table), rounds=1)
    assert isinstance(result, Latency), result


@pytest.mark.parametrize("backend", [*RUNTIMES])
def test_a_missing_artifact_is_its_subjects_error_alone(backend: str, recorded_table: Path, tmp_path: Path) -> None:
    target = target_of(backend, recorded_table)
    missing = dataclasses.replace(FULL, artifact=tmp_path, label="gone")
    subjects = [missing, MIXED] if backend == "onnxruntime" else [missing]
    results = measure_latency(subjects, SHORT, target=target, rounds=1)
    container = find_backend(backend).containers[0]
    assert isinstance(results[0], TargetError)
    assert results[0].what == f"The {container} files of gone was not found: {tmp_path / container}"
    assert all(isinstance(result, Latency) for result in results[1:])


@pytest.mark.parametrize("backend", sorted(BAD_OPTIONS))
def test_unknown_options_name_the_nearest(backend: str) -> None:
    target = Target(name="odd", description="", backend=backend, options=BAD_OPTIONS[backend])
    with pytest.raises(InputError, match=r"there is no such key\. Did you mean '"):
        parse_options(target)


@pytest.mark.parametrize(
    ("backend", "options", "reason"),
    [
        ("onnxruntime", {"providers": ["CoreMLExecutionProvider"]}, "this onnxruntime has no CoreMLExecutionProvider"),
        ("torch", {"device": "cuda:77"}, "torch sees no CUDA device here"),
        ("openvino", {"device": "NPU"}, "OpenVINO sees no NPU here"),
        ("recorded", {"table": "nowhere.json"}, "The cost table was not found: nowhere.json"),
    ],
)
def test_an_unavailable_backend_says_why_and_what_to_do(backend: str, options: dict[str, object], reason: str) -> None:
    if backend in RUNTIMES and importlib.util.find_spec(RUNTIMES[backend]) is None:
        pytest.skip(f"{RUNTIMES[backend]} is not installed")
    target = Target(name="far", description="", backend=backend, options=options)
    availability = find_backend(backend).check(target)
    assert not availability.ok
    assert availability.reason.startswith(reason)
    assert availability.next_step
    with pytest.raises(TargetUnavailable, match=r"^Target 'far' cannot be used: "):
        measure_latency([FULL], SHORT, target=target)


def test_recorded_repeats_the_tables_prediction(recorded_table: Path) -> None:
    from amoeba_export.profile import read_table

    table = read_table(recorded_table)
    target = target_of("recorded", recorded_table)
    (result,) = measure_latency([MIXED], SHORT, target=target)
    assert result == table.latency(MIXED.dense, workload=SHORT)
    assert isinstance(result, Latency)
    assert result.uncertainty is not None


def test_recorded_refuses_what_the_table_cannot_tell(recorded_table: Path) -> None:
    target = target_of("recorded", recorded_table)
    other_model = Subject(
        dense=DenseArchitecture(base=SMOLLM2, layers=(LayerDims(num_heads=9, num_kv_heads=3, ffn_size=64),))
    )
    other_dtype = dataclasses.replace(FULL, dtype="int4")
    results = measure_latency([other_model, other_dtype, FULL], SHORT, target=target)
    assert isinstance(results[0], TargetError)
    assert "was made for another model" in results[0].what
    assert isinstance(results[1], TargetError)
    assert results[1].what == "The cost table of 'some-recorded' was recorded with fp32, full is int4."
    assert isinstance(results[2], Latency)
    (longer,) = measure_latency([FULL], Workload(prompt_tokens=99), target=target)
    assert isinstance(longer, TargetError)
    assert "was measured with 8 prompt tokens" in longer.what
