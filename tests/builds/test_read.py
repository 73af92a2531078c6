"""Malformed files: every message names the line and what to write instead, and is compared exactly."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from amoeba_export.builds.config import json_schema
from amoeba_export.builds.positions import key_lines, line_of
from amoeba_export.builds.read import read_config
from amoeba_export.builds.template import TEMPLATE
from amoeba_export.cli.app import main

OK = '[[build]]\nname = "a"\ntarget = "cpu"\nlatency = "80%"\n'
KEYS = (
    "Choose one of: adapters, calibration_data, dtype, formats, heal, latency, memory, metric, name, out, "
    "percentile, plan, policy, quality_floor, recipe, refit, require_measured, seed, shape, strategy, target, "
    "throughput, vocab_keep, workload."
)
DTYPES = (
    "Choose 'fp32', 'fp16', 'bf16', 'int8', 'q6_k', 'q5_k_m', 'int4-mixed', 'q4_k_m', 'int4', 'w4a16-asym', 'w4a16' "
    "or 'auto'."
)
TARGETS = (
    "Choose one of: cpu, h100, h100-vllm, jetson, jetson-agx-orin, jetson-agx-orin-edgellm, "
    "jetson-agx-orin-llamacpp, jetson-agx-orin-vllm, jetson-agx-thor, jetson-agx-thor-edgellm, "
    "jetson-agx-thor-vllm, jetson-orin-nano, jetson-orin-nano-edgellm, jetson-orin-nano-llamacpp, "
    "jetson-orin-nx, jetson-orin-nx-edgellm, jetson-orin-nx-llamacpp, jetson-orin-nx-vllm, llamacpp-cpu, "
    "openvino-cpu, raspberry-pi-5, raspberry-pi-5-llamacpp, raspberry-pi-5-onnxruntime, rtx-4090, "
    "rtx-4090-llamacpp, rtx-4090-vllm."
)

CASES: dict[str, tuple[str, list[str]]] = {
    "empty": (
        "",
        [
            "line 1: there is no [[build]] entry. Write one: a [[build]] line, and below it name, target, latency.",
        ],
    ),
    "not toml": (
        OK + "formats = [\n",
        [
            "line 5: this is not TOML: Invalid value. Correct the line.",
        ],
    ),
    "unclosed string": (
        '[[build]]\nname = "a\n',
        [
            "line 2: this is not TOML: Illegal character '\\n'. Correct the line.",
        ],
    ),
    "duplicate key": (
        OK + 'name = "b"\n',
        [
            "line 5: this is not TOML: Cannot overwrite a value. Correct the line.",
        ],
    ),
    "unknown table": (
        "[modle]\nid = 'demo'\n" + OK,
        [
            "line 1: modle: there is no such key. "
            "Did you mean 'model'? Choose one of: build, defaults, model, out, workload.",
        ],
    ),
    "unknown key": (
        OK + 'latancy = "50ms"\n',
        [
            "line 5: build.latancy: there is no such key. Did you mean 'latency'? " + KEYS,
        ],
    ),
    "single brackets": (
        '[build]\nname = "a"\n',
        [
            "line 1: build must be a list. Write [[build]] with double brackets.",
        ],
    ),
    "no name": (
        '[[build]]\ntarget = "cpu"\nlatency = "80%"\n',
        [
            'line 1: build.name is missing. Add name = "...".',
        ],
    ),
    "bad name": (
        '[[build]]\nname = "a/b"\nshape = "3x1"\n',
        [
            "line 2: build.name cannot be 'a/b'. Use letters, digits, '.', '_' and '-', a letter or digit first.",
        ],
    ),
    "two names": (
        OK + "\n" + OK,
        [
            "line 7: there are two builds named 'a'. Give one of them another name; the first is on line 1.",
        ],
    ),
    "unknown target": (
        '[[build]]\nname = "a"\ntarget = "cpuu"\nlatency = "80%"\n',
        [
            "line 3: there is no target named 'cpuu'. Did you mean 'cpu'? " + TARGETS,
        ],
    ),
    "bad latency": (
        '[[build]]\nname = "a"\ntarget = "cpu"\nlatency = "banana"\n',
        [
            "line 4: a latency cannot be 'banana'. "
            "Give a time or a share of the full model, such as 50ms, 0.05s or 75%.",
        ],
    ),
    "bad throughput": (
        '[[build]]\nname = "a"\ntarget = "cpu"\nthroughput = "fast"\n',
        [
            "line 4: a throughput cannot be 'fast'. Give tokens per second, such as 30tok/s.",
        ],
    ),
    "bad shape": (
        '[[build]]\nname = "a"\nshape = "24by3"\n',
        [
            "line 3: a shape cannot be '24by3'. Give DEPTHxWIDTH with a width above 0 and at most 1, such as 24x0.75.",
        ],
    ),
    "nothing says": (
        '[[build]]\nname = "a"\ntarget = "cpu"\n',
        [
            "line 1: nothing says how small build 'a' should be. "
            'Add latency = "80%" (or "50ms"), throughput, shape or plan.',
        ],
    ),
    "no target": (
        '[[build]]\nname = "a"\nlatency = "80%"\n',
        [
            "line 1: build 'a' limits a latency and has no target. Add target = \"NAME\".",
        ],
    ),
    "shape and plan": (
        '[[build]]\nname = "a"\nshape = "3x1"\nplan = "amoeba.toml"\n',
        [
            "line 4: build 'a' has both shape and plan. Remove one of them.",
            "line 4: this file is damaged or not what its name says: it is not JSON "
            "(Expecting value: line 1 column 3 (char 2)). Get the file again and retry.",
        ],
    ),
    "bad format": (
        OK + 'formats = ["onnx", "gguff"]\n',
        [
            "line 5: build.formats cannot be 'gguff'. Choose 'onnx', 'safetensors' or 'gguf'.",
        ],
    ),
    "string formats": (
        OK + 'formats = "onnx"\n',
        [
            'line 5: build.formats must be a list. Write formats = ["..."].',
        ],
    ),
    "bad dtype": (
        OK + 'dtype = "fp64"\n',
        [
            "line 5: build.dtype cannot be 'fp64'. " + DTYPES,
        ],
    ),
    "bad percentile": (
        "[defaults]\npercentile = 95\n" + OK,
        [
            "line 2: defaults.percentile cannot be 95. Choose 50 or 90.",
        ],
    ),
    "zero prompt": (
        "[workload]\nprompt_tokens = 0\n" + OK,
        [
            "line 2: workload.prompt_tokens: input should be greater than or equal to 1, not 0. Correct the value.",
        ],
    ),
    "model both": (
        '[model]\nid = "demo"\npath = "x"\n' + OK,
        [
            'line 1: [model] must name one model. Write either path = "folder" or id = "org/name".',
        ],
    ),
    "model missing": (
        '[model]\npath = "nowhere"\n' + OK,
        [
            "line 2: path = 'nowhere' is not there. Paths start from the folder of this file; correct it.",
        ],
    ),
    "no strategy": (
        OK + 'strategy = "s.safetensors"\n',
        [
            "line 5: strategy = 's.safetensors' is not there. Paths start from the folder of this file; correct it.",
        ],
    ),
    "bad recipe": (
        '[defaults]\n\n# a comment\nrecipe = "quik"\n' + OK,
        [
            "line 4: there is no recipe named 'quik'. Did you mean 'quick'? Choose one of: default, paper, quick.",
        ],
    ),
    "bad memory": (
        OK + 'memory = "much"\n',
        [
            "line 5: a memory limit cannot be 'much'. Give an amount such as 900MB, 1.5GB or 2GiB.",
        ],
    ),
    "quoted seed": (
        OK + 'seed = "zero"\n',
        [
            "line 5: build.seed: input should be a valid integer, unable to parse string as an integer, not 'zero'. "
            "Correct the value.",
        ],
    ),
    "nested": (
        OK + 'out = "dist/b"\n\n[[build]]\nname = "b"\nshape = "3x1"\n',
        [
            "line 7: build 'b' would be written into the folder of 'a'. Give it a folder of its own: out = \"FOLDER\".",
        ],
    ),
    "several": (
        '[[build]]\nname = "a"\ntarget = "cpuu"\nlatency = "x"\ndtype = "x"\n'
        "foo = 1\n[[build]]\nshape = 3\n[model]\nid = 1\n",
        [
            "line 3: there is no target named 'cpuu'. Did you mean 'cpu'? " + TARGETS,
            "line 4: a latency cannot be 'x'. Give a time or a share of the full model, such as 50ms, 0.05s or 75%.",
            "line 5: build.dtype cannot be 'x'. " + DTYPES,
            "line 6: build.foo: there is no such key. " + KEYS,
            'line 7: build.name is missing. Add name = "...".',
            "line 8: build.shape: input should be a valid string, not 3. Correct the value.",
            "line 10: model.id: input should be a valid string, not 1. Correct the value.",
        ],
    ),
    "array of numbers": (
        "build = [1]\n",
        [
            "line 1: build must be a table. Write [[build]] on a line of its own, and its keys below.",
        ],
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_a_malformed_file(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    text, problems = CASES[name]
    monkeypatch.chdir(tmp_path)
    Path("amoeba.toml").write_text(text)
    assert main(["build"]) == 3
    lines = capsys.readouterr().err.splitlines()
    count = "a mistake" if len(problems) == 1 else f"{len(problems)} mistakes"
    assert lines[0] == f"error: amoeba.toml has {count}:"
    assert [line.strip() for line in lines[1:-2]] == problems
    assert lines[-2] == f"  where: {tmp_path / 'amoeba.toml'}"
    assert lines[-1] == "  next:  Correct the file; docs/toml.md lists every key."


def test_a_file_that_is_not_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.chdir(tmp_path)
    Path("amoeba.toml").write_bytes(b"# one\n# \xff\n")
    assert main(["build"]) == 3
    assert "  line 2: this is not UTF-8 text. Save the file as UTF-8.\n" in capsys.readouterr().err


def test_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.chdir(tmp_path)
    assert main(["build"]) == 3
    assert capsys.readouterr().err.endswith("  next:  'amoeba init' writes one.\n")


def test_lines_of_keys():
    text = 'a = [\n  "[x]",\n  "k = 1", # ]\n]\n"b.c" = """\n[[y]]\n"""\n'
    text += "[t.u]\nv.w = 1\n[[e]]\nz = {q = 2}\n[[e]]\n[e.s]\nr = 3\n"
    lines = key_lines(text)
    assert lines == {
        ("a",): 1,
        ("b.c",): 5,
        ("t", "u"): 8,
        ("t", "u", "v"): 9,
        ("t", "u", "v", "w"): 9,
        ("e", 0): 10,
        ("e", 0, "z"): 11,
        ("e", 1): 12,
        ("e", 1, "s"): 13,
        ("e", 1, "s", "r"): 14,
    }
    assert line_of(("e", 0, "z", "q"), lines) == 11
    assert line_of(("e", 1, "nothing"), lines) == 12


def test_entries_inherit(tmp_path: Path):
    shared = '[workload]\nprompt_tokens = 64\n[defaults]\ntarget = "cpu"\ndtype = "int4"\n'
    own = OK + 'dtype = "fp32"\nworkload = { batch = 2 }\n[[build]]\nname = "b"\nshape = "3x1"\nout = "elsewhere"\n'
    (tmp_path / "amoeba.toml").write_text(shared + own)
    a, b = read_config(tmp_path / "amoeba.toml").entries
    assert (a.request.dtype, a.request.prompt_tokens, a.request.batch) == ("fp32", 128, 2)
    assert (b.request.dtype, b.request.prompt_tokens, b.request.target) == ("int4", 64, "cpu")
    assert (a.out, b.out) == (tmp_path / "dist" / "a", tmp_path / "elsewhere")


def test_init_writes_what_can_be_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.chdir(tmp_path)
    assert main(["init"]) == 0
    assert capsys.readouterr().out == "Wrote amoeba.toml.\nnext: amoeba build\n"
    assert [entry.name for entry in read_config(Path("amoeba.toml")).entries] == ["jetson"]
    assert main(["init"]) == 2
    assert main(["init", "--force"]) == 0
    uncommented = [
        line.removeprefix("# ") if " = " in line or "# [[" in line else line for line in TEMPLATE.splitlines()
    ]
    everything = "\n".join(uncommented)
    for comment in ('id = "demo"', "strategy =", "adapters ="):
        everything = "\n".join(line for line in everything.splitlines() if not line.startswith(comment))
    everything = everything.replace("models/mine", ".")
    Path("amoeba.toml").write_text(everything)
    assert [entry.name for entry in read_config(Path("amoeba.toml")).entries] == ["jetson", "cpu", "half"]


def test_the_published_schema_is_current():
    published = Path(__file__).parents[2] / "docs" / "amoeba.schema.json"
    assert json.loads(published.read_text()) == json_schema()
