"""The commands of the main job on a tiny model: what they say, and what they refuse."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from amoeba_export.artifact import verify_checksums
from amoeba_export.cli.app import main
from amoeba_export.ir.frontier import Frontier
from tests.conftest import Run
from tests.warm import warm_command

Amoeba = Callable[..., Run]


def squeezed(text: str) -> list[str]:
    return [" ".join(line.split()) for line in text.splitlines()]


def test_the_end_says_what_was_reached(
    amoeba: Amoeba, model: Path, strategy: Path, target: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    run = amoeba("export", model, "--target", target, "--latency", "80%", "--strategy", strategy, "--out", out)
    assert run.code == 0
    assert run.err.startswith("/" + str(model).lstrip("/") + ": uniform subnet within 80% (decode p50) on imaginary")
    lines = squeezed(run.out)
    assert lines[1] == "llama for imaginary"
    names = [line.split()[0] for line in lines[2 : lines.index("", 1)]]
    assert names == ["shape", "dtype", "budget", "full", "predicted", "measured", "used", "quality", "verified"]
    (used,) = (line for line in lines if line.startswith("used "))
    assert re.fullmatch(r"used (9\d|100) % of the budget", used)
    assert f"{out}" in lines
    assert any(line.startswith("onnx/model.onnx ") for line in lines)
    assert lines[-1] == f"next: amoeba bench {out}"


def test_json_is_the_manifest_and_what_was_looked_at(
    amoeba: Amoeba, model: Path, strategy: Path, target: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    run = amoeba(
        "export", model, "--target", target, "--latency", "80%", "--strategy", strategy, "--out", out, "--json"
    )
    data = json.loads(run.out)
    assert data.pop("out") == str(out)
    found = Frontier.from_json(data.pop("frontier"), where="stdout")
    assert found.chosen is not None
    assert found.chosen.shape == f"{data['shape']['depth']}x{data['shape']['width']:g}"
    assert data == json.loads((out / "amoeba.json").read_text())


def test_search_shows_the_candidates_and_writes_nothing(
    amoeba: Amoeba, model: Path, strategy: Path, target: Path, tmp_path: Path
) -> None:
    before = sorted(tmp_path.rglob("*"))
    words = ("search", model, "--target", target, "--latency", "80%", "--strategy", strategy)
    run = amoeba(*words)
    assert run.code == 0
    lines = squeezed(run.out)
    assert lines[0] == "dtype shape decode p50 loss memory"
    rows = [
        line.split()
        for line in lines[1 : lines.index("Bars: decode p50 from 0, and loss from the best to the worst of these.")]
    ]
    assert " ".join(rows[0][:3]) == "fp32 full model"
    assert len({tuple(row[1:3]) for row in rows}) == len(rows)
    assert sum(row[-1] == "chosen" for row in rows) == 1
    assert re.search(r"^\S+ is the best under \S+ ms \(decode p50\): \S+ ms predicted", run.out, re.MULTILINE)
    data = json.loads(amoeba(*words, "--json").out)
    assert data["best"]["fits"] is True
    assert data["plan"]["shape"] == data["best"]["shape"] == Frontier.from_json(data["frontier"], where="").chosen.shape  # type: ignore[union-attr]
    assert sorted(tmp_path.rglob("*")) == before


def test_the_frontier_is_shown_and_a_number_of_it_taken(
    amoeba: Amoeba, model: Path, strategy: Path, target: Path, tmp_path: Path
) -> None:
    words = (model, "--target", target, "--strategy", strategy)
    plots = [word for suffix in ("html", "json") for word in ("--plot", tmp_path / f"a.{suffix}")]
    run = amoeba("frontier", *words, "--latency", "80%", *plots)
    assert run.code == 0
    lines = squeezed(run.out)
    assert lines[0] == "llama on imaginary"
    assert lines[1] == "dtype shape decode p50 loss memory"
    assert lines[-1] == f"next: amoeba export {model} --target {target} --strategy {strategy} --pick N"
    found = Frontier.from_json(json.loads((tmp_path / "a.json").read_text()), where="a.json")
    assert (tmp_path / "a.html").read_text().startswith("<!doctype html>")
    numbers = [line.split()[0] for line in lines[2 : 2 + len(found.numbered)]]
    assert numbers == [str(point.number) for point in reversed(found.numbered)]
    run = amoeba("export", *words, "--pick", "2", "--out", tmp_path / "out", "--json")
    data = json.loads(run.out)
    shape = found.numbered[1].shape
    assert f"{data['shape']['depth']}x{data['shape']['width']:g}" == shape
    assert Frontier.from_json(data["frontier"], where="").chosen.shape == shape  # type: ignore[union-attr]
    refused = amoeba("export", *words, "--pick", "99", "--out", tmp_path / "other")
    assert (refused.code, refused.err.splitlines()[-2]) == (
        2,
        f"error: The frontier has no number 99: its choices are 1 to {len(found.numbered)}.",
    )


def test_a_plot_is_refused_before_the_work(amoeba: Amoeba, model: Path, tmp_path: Path) -> None:
    run = amoeba("export", model, "--shape", "4x1", "--out", tmp_path / "out", "--plot", tmp_path / "a.gif")
    assert run.code == 2
    assert run.err.startswith(f"error: --plot cannot be '{tmp_path / 'a.gif'}'.")
    run = amoeba("export", model, "--shape", "4x1", "--out", tmp_path / "out", "--plot", tmp_path / "a.html")
    assert run.err.startswith("error: There is nothing to plot: the shape is given.")
    assert nothing_left(tmp_path)


def test_a_dry_run_says_what_would_be_built(amoeba: Amoeba, model: Path, strategy: Path, tmp_path: Path) -> None:
    run = amoeba("export", model, "--shape", "3x0.5", "--strategy", strategy, "--out", tmp_path / "o", "--dry-run")
    assert run.code == 0
    assert run.out == "3x0.5 keeps the layers 0 1 3.\n"
    assert not (tmp_path / "o").exists()


def test_bench_and_verify_take_what_export_wrote(
    amoeba: Amoeba, model: Path, strategy: Path, target: Path, tmp_path: Path
) -> None:
    export = ("export", model, "--strategy", strategy, "--target", target, "--latency")
    assert amoeba(*export, "90%", "--out", tmp_path / "a").code == 0
    assert amoeba(*export, "70%", "--out", tmp_path / "b").code == 0
    run = amoeba("bench", tmp_path / "a", tmp_path / "b", "--target", target)
    assert run.code == 0
    assert run.err.endswith("2 artifacts on imaginary, 5 rounds, prompt 128, generate 128, batch 1\n")
    first, second = run.out.splitlines()[1:]
    assert first.split()[0] == str(tmp_path / "a")
    assert first.split()[-1] == "1.000"
    assert float(second.split()[-4]) < 1
    data = json.loads(amoeba("bench", tmp_path / "a", "--target", target, "--json").out)
    assert data[0]["source"] == "measured"
    assert data[0]["decode_ms"]["p90"] > data[0]["decode_ms"]["p50"]

    verified = amoeba("verify", tmp_path / "a", "--model", model, "--strategy", strategy)
    assert verified.code == 0
    assert re.fullmatch(
        r"\S+/a: \d+ files are as they were written and as the provenance statement says; "
        r"largest difference \S+ to the masked supernet, same greedy tokens\.\n",
        verified.out,
    )
    data = json.loads(amoeba("verify", tmp_path / "a", "--model", model, "--strategy", strategy, "--json").out)
    assert data["verification"]["greedy_tokens_equal"] is True


def test_profile_records_what_inspect_reads(amoeba: Amoeba, model: Path, target: Path, tmp_path: Path) -> None:
    run = amoeba("profile", model, "--target", target, "--out", tmp_path / "new" / "table.json")
    assert run.code == 0
    assert "median leave-one-out error" in run.out
    assert json.loads(amoeba("inspect", tmp_path / "new" / "table.json", "--json").out)["target"] == "imaginary"
    refused = amoeba("profile", model, "--target", "jetson", "--out", tmp_path / "x.json")
    assert refused.code == 6


def test_verify_needs_the_very_supernet(
    amoeba: Amoeba, model: Path, strategy: Path, tmp_path: Path, tiny_dirs: dict[str, Path]
) -> None:
    out = tmp_path / "out"
    assert amoeba("export", model, "--shape", "3x0.5", "--strategy", strategy, "--out", out).code == 0
    assert amoeba("verify", out, "--checksums-only").code == 0
    run = amoeba("verify", out)
    assert (run.code, run.err.splitlines()[0]) == (
        3,
        "error: The strategy that the artifact was cut by was not found: sha256 "
        + json.loads((out / "plan.json").read_text())["strategy_id"],
    )
    run = amoeba("verify", out, "--strategy", strategy)
    assert run.code == 3
    assert run.err.endswith(
        "error: The artifact's supernet was not found: llama\n  next:  Say where it is with --model.\n"
    )
    run = amoeba("verify", out, "--strategy", strategy, "--model", tiny_dirs["mistral"])
    assert run.code == 3
    (out / "plan.json").write_text("{}")
    run = amoeba("verify", out, "--checksums-only")
    assert run.code == 3
    assert "plan.json has 2 bytes instead of" in run.err


@pytest.fixture
def damaged(model: Path, tmp_path: Path) -> Callable[[Callable[[dict[str, torch.Tensor]], None]], Path]:
    """A copy of the model with changed weights."""

    def make(change: Callable[[dict[str, torch.Tensor]], None]) -> Path:
        copy = shutil.copytree(model, tmp_path / "inputs" / "model")
        weights = load_file(copy / "model.safetensors")
        change(weights)
        save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
        return copy

    return make


def nothing_left(tmp_path: Path) -> bool:
    return [path.name for path in tmp_path.iterdir() if path.name != "inputs"] == []


def test_a_truncated_model_leaves_nothing(amoeba: Amoeba, model: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(model, tmp_path / "inputs" / "model")
    weights = copy / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    run = amoeba("export", copy, "--shape", "4x1", "--out", tmp_path / "deep" / "out")
    assert run.code == 3
    assert run.out == ""
    assert run.err.splitlines()[1].startswith("error: This file is damaged or not what its name says: ")
    assert nothing_left(tmp_path)


def test_a_reshaped_weight_leaves_nothing(amoeba: Amoeba, damaged: Callable[..., Path], tmp_path: Path) -> None:
    def reshape(weights: dict[str, torch.Tensor]) -> None:
        name = "model.layers.1.mlp.up_proj.weight"
        weights[name] = weights[name].reshape(48, 192)

    run = amoeba("export", damaged(reshape), "--shape", "4x1", "--out", tmp_path / "out")
    assert run.code == 3
    assert "model.layers.1.mlp.up_proj.weight" in run.err
    assert nothing_left(tmp_path)


def test_a_weight_that_is_not_a_number_leaves_nothing(
    amoeba: Amoeba, damaged: Callable[..., Path], tmp_path: Path
) -> None:
    def poison(weights: dict[str, torch.Tensor]) -> None:
        weights["model.layers.2.mlp.up_proj.weight"][3, 4] = torch.nan

    run = amoeba("export", damaged(poison), "--shape", "4x1", "--out", tmp_path / "out")
    assert run.code == 3
    assert "The weight model.layers.2.mlp.up_proj.weight is not finite" in run.err
    assert nothing_left(tmp_path)


def test_a_strategy_of_another_model(
    amoeba: Amoeba, strategy: Path, tmp_path: Path, tiny_dirs: dict[str, Path]
) -> None:
    run = amoeba("export", tiny_dirs["qwen2"], "--strategy", strategy, "--shape", "3x0.5", "--out", tmp_path / "out")
    assert run.code == 3
    assert "error: The strategy was made for another model: " in run.err
    assert nothing_left(tmp_path)


def test_an_adapter_of_another_model(amoeba: Amoeba, model: Path, tmp_path: Path, goldens: Path) -> None:
    run = amoeba("export", model, "--adapter", goldens / "C" / "adapter", "--shape", "4x1", "--out", tmp_path / "out")
    assert run.code == 3
    assert "error: The adapter was made for another model: " in run.err
    assert nothing_left(tmp_path)


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (
            ["--target", "jetsn", "--latency", "5ms"],
            2,
            "error: There is no target named 'jetsn'.",
        ),
        (["--target", "cpu", "--latency", "banana"], 2, "error: A latency cannot be 'banana'."),
        (["--target", "cpu", "--latency", "120%"], 2, "error: A latency cannot be '120%'."),
        (["--latency", "5ms"], 2, "error: A limit needs a device to hold on."),
        ([], 2, "error: Nothing says how small the subnet should be."),
        (["--shape", "24by3"], 2, "error: A shape cannot be '24by3'."),
        (
            ["--shape", "4x1", "--format", "onnx,gguff"],
            2,
            "error: There is no format named 'gguff'.",
        ),
        (["--shape", "4x1", "--policy", "random"], 2, "error: There is no policy named 'random'."),
        (["--shape", "4x1", "--dtype", "fp8"], 2, "error: There is no dtype named 'fp8'."),
        (["--plan", "absent.json"], 3, "error: The plan was not found: absent.json"),
        (["--shape", "4x1", "--strategy", "absent"], 3, "error: The strategy was not found: absent"),
        (["--shape", "4x1", "--adapter", "absent"], 3, "error: The adapter's config was not found: absent"),
        (["--target", "jetson", "--latency", "5ms", "--require-measured"], 6, "error: The latency of target 'jetson"),
    ],
)
def test_settings_that_make_no_sense(
    amoeba: Amoeba, model: Path, tmp_path: Path, words: list[str], code: int, message: str
) -> None:
    run = amoeba("export", model, "--out", tmp_path / "out", *words)
    assert (run.code, run.out) == (code, "")
    assert any(line.startswith(message) for line in run.err.splitlines()), run.err
    assert "Traceback" not in run.err
    assert nothing_left(tmp_path)


def test_all_bad_settings_are_told_at_once(amoeba: Amoeba, model: Path) -> None:
    run = amoeba("export", model, "--target", "nowhere", "--latency", "banana", "--percentile", "42")
    assert run.code == 2
    assert run.err.startswith("error: 3 settings are wrong:\n  1. ")


def test_a_missing_model(amoeba: Amoeba, tmp_path: Path) -> None:
    run = amoeba("export", "absent", "--shape", "4x1", "--out", tmp_path / "out")
    assert run.code == 3
    assert "error: The model was not found: absent\n" in run.err
    assert nothing_left(tmp_path)


def test_a_budget_that_cannot_be_met(amoeba: Amoeba, model: Path, strategy: Path, target: Path, tmp_path: Path) -> None:
    run = amoeba(
        "export", model, "--strategy", strategy, "--target", target, "--latency", "0.001ms", "--out", tmp_path / "out"
    )
    assert run.code == 4
    assert "error: No shape that the strategy knows meets decode p50 <= 0.001 ms; the closest, " in run.err
    assert nothing_left(tmp_path)


def test_an_output_that_exists(amoeba: Amoeba, model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    words = ("export", model, "--shape", "4x1", "--out", out)
    assert amoeba(*words).code == 0
    before = verify_checksums(out)
    run = amoeba(*words)
    assert run.code == 2
    assert run.err.endswith(
        f"error: The output '{out}' already exists.\n  next:  Choose another --out, or replace it with --force.\n"
    )
    assert verify_checksums(out) == before
    assert amoeba(*words, "--force").code == 0
    assert verify_checksums(out).files == before.files


def test_a_read_only_place(amoeba: Amoeba, model: Path, tmp_path: Path) -> None:
    place = tmp_path / "inputs" / "sealed"
    place.mkdir(parents=True)
    place.chmod(0o555)
    run = amoeba("export", model, "--shape", "4x1", "--out", place / "out")
    assert run.code == 3
    assert f"error: The output '{place}/out' cannot be written: {place} is read-only.\n" in run.err
    assert list(place.iterdir()) == []


@pytest.fixture(scope="module")
def waiting(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """An `amoeba` whose exports wait to be stopped."""
    folder = tmp_path_factory.mktemp("bin")
    with warm_command(folder, "tests.cli.waiting:entry"):
        yield folder / "amoeba"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_run_that_is_stopped_half_way(waiting: Path, model: Path, tmp_path: Path, number: signal.Signals) -> None:
    words = ["export", str(model), "--shape", "4x1", "--out", str(tmp_path / "out")]
    run = subprocess.Popen([waiting, *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert run.stdout is not None
    written, process = run.stdout.readline().split()
    assert written == "written"
    assert not (tmp_path / "out").exists()
    os.kill(int(process), number)
    _, talk = run.communicate()
    if number == signal.SIGKILL:
        assert len(list(tmp_path.iterdir())) == 1  # hidden, and swept by the next run
    else:
        assert run.returncode == 130
        assert talk.endswith("Interrupted. Nothing half-written is left.\n")
        assert nothing_left(tmp_path)
    assert main(words) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
