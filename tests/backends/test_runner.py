"""The runner's own parts: what it samples, the weights that it makes, and the zip file that is sent."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from amoeba_export import backends
from amoeba_export.backends.graphs import prepare_onnx
from amoeba_export.backends.onnxruntime import Options
from amoeba_export.backends.runner import device, supervise
from amoeba_export.backends.runner.sampling import sample_ms
from amoeba_export.backends.runner.supervise import NUM_TURNS, run_job
from amoeba_export.backends.runner.weights import write_weights
from amoeba_export.backends.ssh import pack_runner
from tests.backends.models import FULL, MIXED

RUNNER = Path(backends.__file__).with_name("runner")


def test_weights_fill_their_regions_and_no_two_are_equal(tmp_path: Path) -> None:
    """ONNX Runtime packs equal weights once: a model of thirty equal layers would run from the cache."""
    size = 64 * 1024
    regions = [{"offset": 4096 + i * size, "length": size, "dtype": "fp32"} for i in range(60)]
    regions.append({"offset": 4096 + 60 * size, "length": 3_000_001, "dtype": "bytes"})
    write_weights(str(tmp_path / "w"), regions)
    content = (tmp_path / "w").read_bytes()
    assert len(content) == 4096 + 60 * size + 3_000_001
    blobs = [content[region["offset"] : region["offset"] + region["length"]] for region in regions]
    assert len(set(blobs)) == len(blobs)
    values = np.frombuffer(blobs[7], np.float32)
    assert values.std() == pytest.approx(0.02, rel=0.05)
    tiny = np.finfo(np.float32).tiny
    assert not ((values != 0) & (np.abs(values) < tiny)).any()


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_sixteen_bit_weights_are_ordinary_numbers(dtype: str, tmp_path: Path) -> None:
    write_weights(str(tmp_path / "w"), [{"offset": 0, "length": 20_000, "dtype": dtype}])
    words = np.frombuffer((tmp_path / "w").read_bytes(), np.uint16)
    values = words.view(np.float16) if dtype == "fp16" else (words.astype(np.uint32) << 16).view(np.float32)
    assert values.astype(np.float32).std() == pytest.approx(0.02, rel=0.1)


def test_sampling_warms_up_and_stops() -> None:
    calls: list[str] = []
    samples = sample_ms(
        lambda: calls.append("step"),
        before=lambda: calls.append("before"),
        warm_up=2,
        seconds=0,
        least=3,
        most=10,
    )
    assert len(samples) == 3
    assert calls == ["before", "step"] * 5
    assert sample_ms(lambda: 7.5, warm_up=0, seconds=60, least=1, most=4) == [7.5] * 4


def test_a_graph_without_weights_is_small_and_says_where_they_go(tmp_path: Path) -> None:
    prepared = prepare_onnx(MIXED, tmp_path, Options())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.onnx"]
    assert prepared["shared_kv"] is True
    stored = sum(region["length"] for region in prepared["weights"]["regions"])
    assert stored >= MIXED.dense.num_params * 4


def test_files_that_a_runtime_maps_are_copied_anew_each_round(tmp_path: Path) -> None:
    source = tmp_path / "artifact"
    source.mkdir()
    (source / "model.data").write_text("weights")
    subject = {"folder": str(source), "behaviour": "tell"}
    job = {"engine": "tests.backends.faulty", "options": {}, "workload": {}, "rounds": 1, "time_limit_s": 600.0}
    job["subjects"] = [{**subject, "id": 0, "is_mapped": True}, {**subject, "id": 1}]
    copied, given = (event["reason"] for event in run_job(job) if event["event"] == "failure")
    assert given == f"RuntimeError: {source} has [('model.data', 'weights')]"
    assert copied != given
    assert copied.endswith(" has [('model.data', 'weights')]")
    folder = copied.removeprefix("RuntimeError: ").partition(" has ")[0]
    assert not Path(folder).exists()


@pytest.mark.skipif(sys.platform != "linux", reason="asks the system for its memory")
def test_models_are_open_together_and_take_turns(tmp_path: Path) -> None:
    """A machine drifts within seconds: what is compared is measured within less."""
    events = _log_of(tmp_path, [1.0, 1.0])
    decode = ["0 decode of 2", "1 decode of 2", "1 decode of 2", "0 decode of 2"]
    prefill = [turn.replace("decode", "prefill") for turn in decode]
    expected = decode * (NUM_TURNS["decode"] // 2) + (2 * prefill)[: 2 * NUM_TURNS["prefill"]]
    assert events == [turn for turn, before in zip(expected, ["", *expected], strict=False) if turn != before]


@pytest.mark.skipif(sys.platform != "linux", reason="asks the system for its memory")
def test_models_that_do_not_fit_together_are_open_one_after_the_other(tmp_path: Path) -> None:
    alone = ["0 decode of 1", "0 prefill of 1", "1 decode of 1", "1 prefill of 1"]
    assert _log_of(tmp_path, [1e9, 1e9]) == alone


def test_models_of_unknown_size_are_open_one_after_the_other(tmp_path: Path) -> None:
    alone = ["0 decode of 1", "0 prefill of 1", "1 decode of 1", "1 prefill of 1"]
    assert _log_of(tmp_path, [None, None]) == alone


@pytest.mark.skipif(sys.platform != "linux", reason="asks the system for its memory")
def test_no_model_works_while_the_threads_of_another_still_spin(tmp_path: Path) -> None:
    busy: set[str] = set()
    for line in _log_of(tmp_path, [1.0, 1.0], behaviour="spin"):
        name, what = line.split()
        if what == "works":
            busy.add(name)
        else:
            busy.discard(name)
        assert len(busy) <= 1, line


def test_each_round_begins_with_another_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who is opened first is slower: over the rounds, that is everyone's luck. None is opened here."""
    monkeypatch.setattr(supervise, "_measure", lambda together, *_: {one["id"]: {"decode_ms": []} for one in together})
    job = _job(tmp_path, [None] * 4, behaviour="log", rounds=5)
    order = [event["id"] for event in run_job(job) if event["event"] == "result"]
    assert [order[i : i + 4] for i in range(0, 20, 4)] == [
        [0, 1, 2, 3],
        [2, 3, 0, 1],
        [0, 1, 2, 3],
        [3, 0, 1, 2],
        [1, 2, 3, 0],
    ]


@pytest.mark.parametrize(
    ("files", "free_mb"),
    [
        ({}, 8000),
        ({"memory.max": "max", "memory.current": str(90 << 20)}, 8000),
        ({"memory.max": str(2000 << 20), "memory.current": str(1500 << 20)}, 500),
        (
            {
                "memory.max": str(2000 << 20),
                "memory.current": str(1500 << 20),
                "memory.stat": f"anon 1\ninactive_file {1000 << 20}\n",
            },
            1500,
        ),
        ({"memory.max": str(100 << 20), "memory.current": str(150 << 20)}, 0),
    ],
)
def test_available_memory_is_that_of_the_container(
    files: dict[str, str], free_mb: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    contents = {f"/sys/fs/cgroup/{name}": text for name, text in files.items()}
    contents["/proc/meminfo"] = f"MemTotal: {16000 << 10} kB\nMemAvailable: {8000 << 10} kB"
    monkeypatch.setattr(device, "_text", lambda path: contents.get(path, ""))
    assert device.available_memory_mb() == free_mb


@pytest.mark.parametrize(
    ("modes", "tunables", "fact"),
    [
        ("always madvise [never]", "", "never"),
        ("always [madvise] never", "glibc.pthread.rseq=0:glibc.malloc.hugetlb=1", "madvise glibc.malloc.hugetlb=1"),
        ("", "glibc.malloc.hugetlb=1", None),
    ],
)
def test_a_machine_tells_who_gets_huge_pages(
    modes: str, tunables: str, fact: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Decode depends on it: a cost table of one kind is not for the other."""
    monkeypatch.setenv("GLIBC_TUNABLES", tunables)
    monkeypatch.setattr(device, "_text", lambda path: modes if "transparent_hugepage" in path else "")
    assert device.describe_machine().get("huge_pages") == fact


def _log_of(folder: Path, sizes_mb: list[float | None], *, behaviour: str = "log") -> list[str]:
    """What models of these sizes note down in one round."""
    events = run_job(_job(folder, sizes_mb, behaviour=behaviour))
    assert [event["event"] for event in events] == ["device", *["result"] * len(sizes_mb), "done"]
    return (folder / "log").read_text().splitlines()


def _job(folder: Path, sizes_mb: list[float | None], *, behaviour: str, rounds: int = 1) -> dict[str, Any]:
    subject = {"folder": str(folder), "behaviour": behaviour}
    subjects = [
        {**subject, "id": i, **({} if size is None else {"memory_mb": size})} for i, size in enumerate(sizes_mb)
    ]
    engine = {"engine": "tests.backends.faulty", "options": {}}
    return {**engine, "workload": {}, "rounds": rounds, "time_limit_s": 600.0, "subjects": subjects}


def test_the_runner_imports_nothing_of_ours() -> None:
    """It is sent to devices that have numpy and a runtime, and nothing else."""
    for path in RUNNER.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and not node.level:
                names.append(node.module or "")
            assert not any(name.startswith("amoeba_export") for name in names), path


def test_the_zip_file_measures_without_amoeba(tmp_path: Path) -> None:
    import json

    archive = tmp_path / "runner.zip"
    pack_runner(archive)
    graph = tmp_path / "graph"
    graph.mkdir()
    job = {
        "engine": "onnxruntime",
        "options": {**Options().model_dump(mode="json"), "threads": 1},
        "workload": {"prompt_tokens": 8, "generate_tokens": 8, "batch": 2},
        "rounds": 1,
        "time_limit_s": 600,
        "subjects": [{"id": 0, **prepare_onnx(FULL, graph, Options())}],
    }
    (tmp_path / "job.json").write_text(json.dumps(job))
    run = subprocess.run(
        [sys.executable, "-P", "-m", "amoeba_runner", "--job", str(tmp_path / "job.json")],
        env={"PYTHONPATH": str(archive), "PATH": ""},
        capture_output=True,
        text=True,
        cwd=tmp_path,
        check=True,
        stdin=subprocess.DEVNULL,
    )
    events = [json.loads(line) for line in run.stdout.splitlines()]
    assert [event["event"] for event in events] == ["device", "result", "done"]
    assert min(events[1]["decode_ms"]) > 0
    assert [path.name for path in graph.iterdir()] == ["model.onnx"], "the weights are gone again"


def test_the_runner_runs_on_python_3_8() -> None:
    """JetPack 5 has no newer one. The grammar is checked; annotations are never evaluated."""
    for path in RUNNER.glob("*.py"):
        source = path.read_text()
        ast.parse(source, feature_version=(3, 8))
        assert "from __future__ import annotations" in source or path.name == "__init__.py"
