"""The commands that look at things: targets, doctor, inspect, import."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from amoeba_export.artifact import Staging, VerificationRecord
from amoeba_export.ir import Architecture, SubnetPlan
from tests.artifact.manifests import manifest
from tests.conftest import Run

Amoeba = Callable[..., Run]


@pytest.fixture(scope="module")
def plan() -> SubnetPlan:
    return SubnetPlan.full(
        Architecture(
            family="llama",
            num_layers=2,
            hidden_size=64,
            num_heads=4,
            num_kv_heads=2,
            head_dim=16,
            ffn_size=96,
            vocab_size=128,
            max_positions=256,
            norm_eps=1e-5,
            rope_theta=1e4,
        )
    )


@pytest.mark.parametrize("words", [["targets"], ["targets", "list"]])
def test_targets_are_listed_on_stdout(amoeba: Amoeba, words: list[str]) -> None:
    run = amoeba(*words)
    assert (run.code, run.err) == (0, "")
    header, *rows = run.out.splitlines()
    assert header.split() == ["target", "recommended", "for", "backend", "dtype", "formats", "what", "it", "is"]
    assert "cpu" in [row.split()[0] for row in rows]
    assert any(row.split()[:3] == ["jetson-orin-nano-llamacpp", "jetson,", "jetson-orin-nano"] for row in rows)


def test_targets_as_json(amoeba: Amoeba) -> None:
    run = amoeba("targets", "list", "--json")
    assert {"cpu", "jetson-orin-nano-llamacpp"} <= {target["name"] for target in json.loads(run.out)}
    assert json.loads(amoeba("targets", "show", "jetson", "--json").out)["name"] == "jetson-orin-nano-llamacpp"


def test_one_target_is_shown_with_its_sources(amoeba: Amoeba) -> None:
    run = amoeba("targets", "show", "jetson")
    assert run.code == 0
    sheet = dict(
        re.split(r"\s{2,}", line.strip(), maxsplit=1) for line in run.out.splitlines()[1:] if "  " in line.strip()
    )
    assert sheet["flow"] == "llama.cpp"
    assert sheet["power mode"] == "25 W (nvpmodel -m 1)"
    assert sheet["names"] == "jetson-orin-nano-llamacpp, jetson, jetson-orin-nano"
    assert sheet["formats"] == "gguf, safetensors"
    assert sheet["precisions"] == "int4, q4_k_m, int8, fp16 (a search chooses among them)"
    assert sheet["FFN sizes"] == "multiples of 32"
    assert sheet["limits"].startswith("biases on o_proj and down_proj in llama, mistral, qwen2, ")
    assert sheet["latencies"] == "estimated: no device is asked"
    assert sheet["bandwidth"] == "102 GB/s, of which reading weights reaches 50 %"
    assert sheet["overhead"] == "0.134 ms a layer"
    assert sheet["error"] == "estimates may be off by 30 % either way"
    assert "source 1" in sheet


def test_a_target_that_is_measured_has_its_options_on_the_sheet(amoeba: Amoeba) -> None:
    shown = amoeba("targets", "show", "llamacpp-cpu").out
    assert "gpu_layers" in shown and "measured here" in shown


def test_a_target_that_can_be_used(amoeba: Amoeba) -> None:
    run = amoeba("targets", "check", "jetson")
    assert (run.code, run.err) == (0, "")
    assert run.out.startswith("jetson-orin-nano-llamacpp can be estimated (analytic).")
    assert json.loads(amoeba("targets", "check", "jetson", "--json").out)["ok"] is True


def test_a_target_that_cannot_be_used_is_exit_6(amoeba: Amoeba, tmp_path: Path) -> None:
    board = tmp_path / "board.toml"
    board.write_text('description = "A board"\nbackend = "recorded"\n[options]\ntable = "absent.json"\n')
    run = amoeba("targets", "check", board)
    assert run.code == 6
    assert run.err.startswith("error: Target 'board' cannot be used: ")
    run = amoeba("targets", "check", board, "--json")
    assert (run.code, json.loads(run.out)["ok"]) == (6, False)


def test_an_unknown_target(amoeba: Amoeba) -> None:
    run = amoeba("targets", "show", "jetsn")
    assert run.code == 2
    assert run.err.startswith(
        "error: There is no target named 'jetsn'. Did you mean 'jetson'?\n  next:  Choose one of: "
    )


def test_doctor_says_what_there_is(amoeba: Amoeba) -> None:
    run = amoeba("doctor")
    assert (run.code, run.err) == (0, "")
    data = json.loads(amoeba("doctor", "--json").out)
    assert list(data) == [
        "amoeba",
        "python",
        "executable",
        "system",
        "cores",
        "memory_bytes",
        "packages",
        "targets",
        "demo",
        "cache",
    ]
    assert data["packages"]["torch"]["version"]
    assert data["packages"]["ray"]["extra"] == "ray"
    assert data["targets"]["jetson-orin-nano-llamacpp"]["source"] == "analytic"
    assert "pytest" not in data["packages"]
    for name in ("torch", "cpu", "jetson-orin-nano-llamacpp", data["cache"]["path"]):
        assert name in run.out


def test_inspect_an_artifact(amoeba: Amoeba, tmp_path: Path) -> None:
    with Staging(tmp_path / "out") as staging:
        (staging.folder / "model.onnx").write_bytes(bytes(4096))
        staging.publish(manifest())
    run = amoeba("inspect", tmp_path / "out")
    assert (run.code, run.err) == (0, "")
    lines = [" ".join(line.split()) for line in run.out.splitlines()]
    assert lines[:10] == [
        "demo for cpu",
        "shape 1x0.5 (layers x width), 3 query heads, 1 KV heads, 48 FFN units a layer",
        "dtype fp32",
        "budget 20.00 ms decode p50",
        "predicted 18.50 ms ± 5 %",
        "measured 19.00 ms (decode p50 19.00 ms, p90 21.00 ms)",
        "used 95 % of the budget",
        "quality loss 3.25",
        "verified largest difference 1e-05 to the masked supernet, same greedy tokens",
        "",
    ]
    assert "model.onnx 4.1 kB" in lines
    assert json.loads(amoeba("inspect", tmp_path / "out", "--json").out)["kind"] == "artifact"
    same = json.loads(amoeba("inspect", tmp_path / "out" / "amoeba.json", "--json").out)
    assert same["model"] == "demo"


def test_an_estimate_is_called_one(amoeba: Amoeba, tmp_path: Path) -> None:
    made = manifest()
    assert made.latency is not None
    estimate = dataclasses.replace(made.latency, source="analytic", measured_ms=None, target="jetson")
    with Staging(tmp_path / "out") as staging:
        staging.publish(dataclasses.replace(made, latency=estimate))
    run = amoeba("inspect", tmp_path / "out")
    assert "estimate  18.50 ms  ± 5 %  (analytic, no device was asked)" in run.out
    assert "measured" not in run.out


def test_what_is_quantized_says_what_that_did(amoeba: Amoeba, tmp_path: Path) -> None:
    record = VerificationRecord(
        max_abs_diff=20.0, max_rel_diff=0.5, greedy_tokens_equal=False, mean_kl=0.25, perplexity_ratio=1.3
    )
    with Staging(tmp_path / "out") as staging:
        staging.publish(manifest(dtype="int4", verification=record))
    run = amoeba("inspect", tmp_path / "out")
    assert [" ".join(line.split()) for line in run.out.splitlines()][8] == (
        "verified KL divergence 0.25 nats a token from the subnet unquantized, perplexity 1.30 times as high, "
        "greedy tokens differ"
    )


def test_inspect_a_plan(amoeba: Amoeba, tmp_path: Path, plan: SubnetPlan) -> None:
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(plan.to_json()))
    run = amoeba("inspect", path)
    assert (run.code, run.err) == (0, "")
    assert [" ".join(line.split()) for line in run.out.splitlines()][-2:] == [
        "0 0 0 1 2 3 0 1 96",
        "1 1 0 1 2 3 0 1 96",
    ]
    assert json.loads(amoeba("inspect", path, "--json").out)["shape"] == "2x1"


def test_inspect_a_model(amoeba: Amoeba, tiny_dirs: dict[str, Path]) -> None:
    run = amoeba("inspect", tiny_dirs["qwen3"], "--json")
    data = json.loads(run.out)
    assert (data["family"], data["num_layers"], data["head_dim"], data["vocab_size"]) == ("qwen3", 4, 32, 128)
    assert "num params" in amoeba("inspect", tiny_dirs["qwen3"]).out


def test_import_and_inspect_a_published_strategy(amoeba: Amoeba, tmp_path: Path, goldens: Path) -> None:
    out = tmp_path / "new" / "s.safetensors"
    run = amoeba("import", goldens / "C" / "dp_selection_strategy.npy", goldens / "C" / "base", "--out", out)
    assert run.code == 0
    assert "widths           0.8, 0.65, 0.5" in run.out
    data = json.loads(amoeba("inspect", out, "--json").out)
    assert data["kind"] == "strategy"
    assert data["depths"][1] == {"depth": 5, "metric": pytest.approx(5.2333, abs=1e-4), "layers": [0, 1, 2, 4, 5]}
    assert "widths" in amoeba("inspect", out).out
    adapter = amoeba("inspect", goldens / "C" / "adapter")
    assert "width_choice" in adapter.out


def test_importing_for_another_model(amoeba: Amoeba, tmp_path: Path, goldens: Path, tiny_dirs: dict[str, Path]) -> None:
    file = goldens / "C" / "dp_selection_strategy.npy"
    run = amoeba("import", file, tiny_dirs["llama"], "--out", tmp_path / "s.safetensors")
    assert run == Run(
        3,
        "",
        "error: The strategy was made for another model: num_layers is 6 there and 4 here.\n"
        f"  where: {file}\n"
        "  next:  Use the strategy that belongs to this model, or make a new one.\n",
    )
    assert list(tmp_path.iterdir()) == []


def test_a_file_output_that_is_a_folder_is_refused_before_the_work(amoeba: Amoeba, tmp_path: Path) -> None:
    assert amoeba("import", "absent.npy", "absent", "--out", tmp_path) == Run(
        2, "", f"error: The output '{tmp_path}' is a folder.\n  next:  Give the name of a file.\n"
    )


def test_a_file_output_that_cannot_be_written_is_refused_before_the_work(amoeba: Amoeba, tmp_path: Path) -> None:
    tmp_path.chmod(0o555)
    run = amoeba("calibrate", "absent", "--out", tmp_path / "s.safetensors")
    tmp_path.chmod(0o755)
    assert run == Run(
        3,
        "",
        f"error: The output '{tmp_path}/s.safetensors' cannot be written: {tmp_path} is read-only.\n"
        "  next:  Choose an --out in a folder that you may write to.\n",
    )


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("absent", None, "What should be inspected was not found"),
        ("notes.txt", "x", "This is nothing that amoeba can inspect."),
        ("a.json", "{", "This file is damaged or not what its name says: it is not JSON"),
        ("a.json", "{}", "This JSON file is neither a plan nor a cost table."),
        ("a.json", '{"layers": []}', "This is not a plan: it has no schema_version."),
        ("a.json", '{"fits": {}}', "This file is damaged or not what its name says: it is not a cost table (it has no"),
        ("amoeba.json", "{}", "This file is damaged or not what its name says: it is not a manifest"),
        ("a.safetensors", "x", "This file is damaged or not what its name says: "),
    ],
)
def test_inspecting_something_else(
    amoeba: Amoeba, tmp_path: Path, name: str, content: str | None, message: str
) -> None:
    if content is not None:
        (tmp_path / name).write_text(content)
    run = amoeba("inspect", tmp_path / name)
    assert run.code == 3
    assert run.out == ""
    assert run.err.startswith(f"error: {message}")


def test_a_truncated_model(amoeba: Amoeba, tmp_path: Path, tiny_dirs: dict[str, Path]) -> None:
    model = shutil.copytree(tiny_dirs["llama"], tmp_path / "model")
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    run = amoeba("inspect", model)
    assert run.code == 3
    assert run.err.startswith("error: This file is damaged or not what its name says: ")
