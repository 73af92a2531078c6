"""`amoeba targets new`: answers in, a commented target file out."""

from __future__ import annotations

import dataclasses
import json
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest

from amoeba_export.backends.new_target import COMMENTS, Question, new_target
from amoeba_export.backends.targets import LimitsTable, TargetFile, read_target
from amoeba_export.errors import UsageError
from amoeba_export.load import load_supernet, write_strategy
from tests.conftest import Run
from tests.search.strategies import own_strategy

Amoeba = Callable[..., Run]


def test_options_alone_make_a_file_that_export_takes(
    amoeba: Amoeba, tiny_dirs: dict[str, Path], tmp_path: Path
) -> None:
    file = tmp_path / "desk.toml"
    run = amoeba("targets", "new", file, "--description", "My desk", "--option", "threads=1", "--dtype", "fp32")
    assert (run.code, run.err) == (0, "")
    assert run.out == f"{file}\n\nnext: amoeba targets check {file}\n"
    target = read_target(file)
    assert (target.backend, target.dtypes, target.formats) == ("onnxruntime", ("fp32",), ("onnx", "safetensors"))
    assert (target.align, target.options["threads"]) == (read_target("cpu").align, 1)
    assert "My desk" in amoeba("targets", "show", file).out
    supernet, strategy = load_supernet(str(tiny_dirs["llama"])), tmp_path / "strategy.safetensors"
    made = own_strategy(supernet.architecture, depths=(4, 3, 2), widths=(1.0,))
    write_strategy(dataclasses.replace(made, model_id=supernet.identity), strategy)
    out = tmp_path / "out"
    run = amoeba(
        "export", tiny_dirs["llama"], "--target", file, "--strategy", strategy, "--shape", "3x1.0", "--out", out
    )
    assert run.code == 0, run.err
    assert (out / "onnx" / "model.onnx").is_file()


def test_every_key_says_what_it_means(amoeba: Amoeba, tmp_path: Path) -> None:
    file = tmp_path / "board.toml"
    words = ("--description", "A board", "--like", "rtx-4090-vllm", "--memory", "4000", "--power-mode", "15 W")
    assert amoeba("targets", "new", file, *words).code == 0
    tables = ""
    for line in file.read_text().splitlines():
        if line.startswith("["):
            tables = line.partition("]")[0].strip("[") + "."
        elif " = " in line and tables not in ("options.", "on_device."):
            key = line.partition(" = ")[0]
            assert line.endswith(f"  # {COMMENTS[('' if tables == 'options.' else tables) + key]}"), line
    target, like = read_target(file), read_target("rtx-4090-vllm")
    assert (target.limits.ffn_multiple, target.options) == (like.limits.ffn_multiple, like.options)
    assert (target.memory_limit_mb, target.power_mode) == (4000, "15 W")
    assert target.sources == ("What was not given is that of rtx-4090-vllm.",)


def test_all_keys_have_a_comment() -> None:
    assert {*TargetFile.model_fields} - {"aliases"} <= {*COMMENTS}
    assert {f"limits.{name}" for name in LimitsTable.model_fields} <= {*COMMENTS}


def test_limits_and_tables_in_options_are_given_by_key(amoeba: Amoeba, tmp_path: Path) -> None:
    file = tmp_path / "phone.toml"
    options = {
        "prefill.run": '["bench", "{gguf}", "-p", "{prompt}"]',
        "prefill.regex": "pp (.*) ms",
        "prefill.unit": "ms",
        "decode.run": '["bench", "{gguf}", "-n", "{generate}", "-d", "{prompt}"]',
        "decode.regex": "tg (.*) ms",
        "decode.unit": "ms",
    }
    words = [word for key, value in options.items() for word in ("--option", f"{key}={value}")]
    words += ["--limit", "ffn_multiple=256", "--limit", "output_biases=false", "--format", "gguf", "--dtype", "int4"]
    words += ["--flow", "MyRuntime"]
    run = amoeba("targets", "new", file, "--description", "A phone", "--backend", "command", *words)
    assert run.code == 0, run.err
    data = tomllib.loads(file.read_text())
    assert data["options"]["decode"] == {"run": ["bench", "{gguf}", "-n", "{generate}", "-d", "{prompt}"],
                                         "regex": "tg (.*) ms", "unit": "ms"}  # fmt: skip
    target = read_target(file)
    assert (target.limits.runtime, target.limits.ffn_multiple, target.limits.output_biases) == ("MyRuntime", 256, ())


def test_mistakes_are_named_together_and_nothing_is_written(amoeba: Amoeba, tmp_path: Path) -> None:
    file = tmp_path / "x.toml"
    run = amoeba("targets", "new", file)
    assert (run.code, run.out) == (2, "")
    assert "Not answered: What is it, in a line?" in run.err and "Give --description" in run.err
    run = amoeba("targets", "new", file, "--description", "x", "--option", "thread=1", "--limit", "ffn_multiple=0")
    assert run.code == 3
    assert "options.thread: there is no such key. Did you mean 'threads'?" in run.err
    assert "limits.ffn_multiple" in run.err and "nothing was written" in run.err
    run = amoeba("targets", "new", file, "--description", "x", "--dtype", "q4_k_m")
    assert run.code == 2 and "--dtype cannot be 'q4_k_m'" in run.err
    run = amoeba("targets", "new", file, "--description", "x", "--backend", "analytic")
    assert run.code == 2 and "--option bandwidth_gb_s=VALUE" in run.err
    assert amoeba("targets", "new", file, "--description", "x", "--option", "threads").code == 2
    assert list(tmp_path.iterdir()) == []


def test_a_person_is_asked_for_what_no_option_says(tmp_path: Path) -> None:
    asked: list[str] = []
    answers = {"description": "A robot", "backend": "llamacpp", "formats": "gguf", "dtype": "q4_k_m, int8"}

    def ask(question: Question) -> str:
        asked.append(question.key)
        return answers.get(question.key, "")

    target = new_target({"flow": "llama.cpp b9000"}, ask, path=tmp_path / "robot.toml")
    assert asked == ["description", "backend", "power_mode", "formats", "dtype", "metric", "memory_limit_mb"]
    assert (target.dtypes, target.formats, target.flow) == (("q4_k_m", "int8"), ("gguf",), "llama.cpp b9000")
    assert target.limits.output_biases == read_target("llamacpp-cpu").limits.output_biases
    assert read_target(tmp_path / "robot.toml") == target


def test_an_estimate_asks_for_its_figures(tmp_path: Path) -> None:
    figures = {"bandwidth_gb_s": 50, "bandwidth_efficiency": 0.6, "compute_tflops": 2, "per_layer_ms": 0.1,
               "uncertainty": 0.3}  # fmt: skip
    given = {"description": "x", "backend": "analytic", "formats": ["gguf"]}
    target = new_target(
        given, lambda question: str(figures.get(question.key.removeprefix("options."), "")), path=tmp_path / "x.toml"
    )
    assert target.options == figures
    with pytest.raises(UsageError, match="is there already"):
        new_target(given, lambda question: "1", path=tmp_path / "x.toml")


def test_json_never_asks(amoeba: Amoeba, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    run = amoeba("targets", "new", tmp_path / "x.toml", "--description", "x", "--json")
    assert json.loads(run.out)["target"]["backend"] == "onnxruntime"
