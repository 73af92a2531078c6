"""Code that a model or an artifact brings never runs, and an artifact that brings some is refused by name."""

from __future__ import annotations

import builtins
import io
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from amoeba_export.backends.ssh import pack_runner
from amoeba_export.model.foreign_code import modeling_file
from amoeba_export.model.opening import read_config
from tests.conftest import Run
from tests.trust.conftest import Place
from tests.trust.planted import code, edit, plant_everywhere, renew_checksums

Amoeba = Callable[..., Run]
Change = Callable[[Path, Path], None]


@pytest.fixture
def mark(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file that is only there when planted code ran. Somebody answers every question with yes."""
    monkeypatch.setattr(builtins, "input", lambda *_: "y")
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n" * 20))
    return tmp_path / "it-ran"


PI = "raspberry-pi-5-onnxruntime"
"""Estimated, and its container is ONNX."""


def command(name: str, place: Place, out: Path) -> list[Any]:
    """A command line that reads a model as far as it can."""
    formats = ("--format", "safetensors,onnx")
    few = (
        "--prompt-format",
        "alpaca",
        "--max-steps",
        1,
        "--batch-size",
        1,
        "--max-length",
        256,
        "--rank",
        2,
        "--widths",
        "1,0.5",
        "--depths",
        "3",
    )
    return {
        "inspect": ["inspect", place.model],
        "search": [
            "search",
            place.model,
            "--strategy",
            place.strategy,
            "--target",
            "raspberry-pi-5-onnxruntime",
            "--latency",
            "90%",
        ],
        "calibrate": ["calibrate", place.model, "--recipe", place.recipe, "--out", out],
        "evaluate": ["evaluate", place.model, "--text", place.text, "--window", 16, "--windows", 2],
        "finetune": ["finetune", place.model, "--strategy", place.strategy, "--data", place.data, "--out", out, *few],
        "export": ["export", place.model, "--strategy", place.strategy, "--shape", "3x0.5", "--out", out, *formats],
    }[name]


@pytest.mark.parametrize("module", ["evil", "ABSOLUTE", "somebody/repository--evil", "..evil"])
@pytest.mark.parametrize("name", ["inspect", "search", "calibrate", "evaluate", "finetune", "export"])
def test_code_of_a_model_never_runs(
    amoeba: Amoeba, place: Place, tmp_path: Path, mark: Path, monkeypatch: pytest.MonkeyPatch, name: str, module: str
) -> None:
    """The model is of a type that transformers has: it works, and its code is not needed."""
    plant_everywhere(place.model, mark, module=module.replace("ABSOLUTE", str(place.model / "evil")))
    monkeypatch.chdir(place.model)
    words = command(name, place, tmp_path / ("out.safetensors" if name == "calibrate" else "out"))
    if name == "search" and module != "evil":  # all precisions once: their rounding reads the model as the others do
        words += ["--dtype", "int8"]
    run = amoeba(*words)
    assert not mark.exists(), mark.read_text()
    assert run.code == 0, run.err
    if name == "export":
        written = [path.name for path in (tmp_path / "out").rglob("*")]
        assert not [path for path in written if path.endswith((".py", ".bin"))]
        for path in (tmp_path / "out").rglob("*.json"):
            assert "auto_map" not in json.loads(path.read_text()), path


def test_a_chat_template_is_rendered_in_a_sandbox(amoeba: Amoeba, place: Place, tmp_path: Path, mark: Path) -> None:
    plant_everywhere(place.model, mark)
    words = command("finetune", place, tmp_path / "out")
    words[words.index("alpaca")] = "chat"
    run = amoeba(*words)
    assert not mark.exists()
    assert run.code == 7
    assert "The model's chat template cannot be rendered: " in run.err


def test_a_model_whose_type_only_its_code_knows_is_refused(amoeba: Amoeba, place: Place, mark: Path) -> None:
    plant_everywhere(place.model, mark)
    edit(place.model / "config.json", model_type="evil")
    assert amoeba("inspect", place.model).code == 7
    assert not mark.exists()


def _module(name: str, where: str = "safetensors") -> Change:
    return lambda artifact, mark: (artifact / where / name).write_text(code(mark)) and None


def _edited(file: str, **changes: Any) -> Change:
    def change(artifact: Path, mark: Path) -> None:
        folder = (artifact / file).parent
        (folder / "zevil.py").write_text(code(mark))
        text = json.dumps(changes).replace("FOLDER", str(folder))
        edit(artifact / file, **json.loads(text))

    return change


def _genai(**decoder: Any) -> Change:
    def change(artifact: Path, mark: Path) -> None:
        path = artifact / "onnx" / "genai_config.json"
        content = json.loads(path.read_text())
        content["model"]["decoder"] |= decoder
        path.write_text(json.dumps(content))

    return change


def _appended(artifact: Path, mark: Path) -> None:
    path = artifact / "safetensors" / "modeling_amoeba.py"
    path.write_text(path.read_text() + code(mark))


ONNX_KINDS = ("a library", "graph's config", "operators", "provider", "a graph elsewhere")
OURS = {"AutoConfig": "modeling_amoeba.AmoebaConfig"}
SAFE, ONNX = "safetensors/config.json", "onnx/genai_config.json"
CHANGES: dict[str, tuple[Change, str]] = {
    "edited modeling_amoeba.py": (_appended, "modeling_amoeba.py differs from the file of this amoeba"),
    "another module": (_module("evil.py"), "evil.py is none of its files"),
    "a library": (_module("evil.so", "onnx"), "evil.so is none of its files"),
    "a module named": (
        _edited(SAFE, auto_map=OURS | {"AutoModelForCausalLM": "zevil.AmoebaForCausalLM"}),
        "auto_map in config.json names",
    ),
    "an absolute path": (
        _edited(SAFE, auto_map=OURS | {"AutoModelForCausalLM": "FOLDER/zevil.M"}),
        "auto_map in config.json names",
    ),
    "one more class": (
        _edited(SAFE, auto_map={**OURS, "AutoTokenizer": ["zevil.T", None]}),
        "auto_map in config.json names",
    ),
    "tokenizer": (
        _edited("safetensors/tokenizer_config.json", auto_map={"AutoTokenizer": ["zevil.T", "zevil.T"]}),
        "auto_map in tokenizer_config.json names",
    ),
    "kernel": (_edited(SAFE, attn_implementation="somebody/kernel"), "attn_implementation in config.json names"),
    "adapter": (
        _edited("safetensors/adapter_config.json", base_model_name_or_path="FOLDER/elsewhere", peft_type="LORA"),
        "adapter_config.json would make transformers load another model",
    ),
    "graph's config": (_edited("onnx/config.json", auto_map={"AutoConfig": "zevil.C"}), "auto_map in config.json"),
    "operators": (
        _genai(session_options={"custom_ops_library": "evil.so", "provider_options": []}),
        'custom_ops_library in genai_config.json names "evil.so"',
    ),
    "provider": (
        _genai(session_options={"provider_options": [{"qnn": {"backend_path": "evil.so"}}]}),
        "provider_options in genai_config.json names",
    ),
    "a graph elsewhere": (_genai(filename="../../evil.onnx"), "filename in genai_config.json names"),
}


@pytest.mark.parametrize("kind", CHANGES)
def test_an_artifact_that_brings_code_is_refused(
    amoeba: Amoeba, place: Place, mark: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """By `verify`, `evaluate` and `bench` alike, whatever its checksums say; `inspect` reads the manifest alone."""
    change, problem = CHANGES[kind]
    change(place.artifact, mark)
    renew_checksums(place.artifact)
    monkeypatch.chdir(place.artifact / "safetensors")
    container = "onnx" if kind in ONNX_KINDS else "safetensors"
    runs = {
        "verify": amoeba("verify", place.artifact, "--model", place.model, "--strategy", place.strategy),
        "evaluate": amoeba("evaluate", place.artifact, "--text", place.text, "--window", 16, "--format", container),
    }
    if kind in ("edited modeling_amoeba.py", "operators"):  # it starts the runtime first, which takes seconds
        target = place.artifact.parent / "here.toml"
        backend = "torch" if container == "safetensors" else "onnxruntime"
        target.write_text(f'description = "here"\nbackend = "{backend}"\n')
        runs["bench"] = amoeba("bench", place.artifact, "--target", target, "--rounds", 1)
    assert not mark.exists(), mark.read_text()
    for name, run in runs.items():
        assert run.code == (6 if name == "bench" else 3)  # bench says of each artifact why it has no figure
        assert problem in run.err
        assert "It was not run." in run.err
    assert amoeba("inspect", place.artifact).code == 0
    assert not mark.exists()


def test_a_good_artifact_is_taken(amoeba: Amoeba, place: Place, mark: Path) -> None:
    """With our own `modeling_amoeba.py` in it, through all three commands."""
    target = place.artifact.parent / "eager.toml"
    target.write_text('description = "here"\nbackend = "torch"\n')
    common = ("--prompt", 4, "--generate", 4, "--rounds", 1)
    assert amoeba("verify", place.artifact, "--model", place.model, "--strategy", place.strategy).code == 0
    assert amoeba("evaluate", place.artifact, "--text", place.text, "--window", 16, "--windows", 1).code == 0
    assert amoeba("bench", place.artifact, "--target", target, *common).code == 0


def test_an_unpacked_gguf_is_read_alone(amoeba: Amoeba, tmp_path: Path, mark: Path) -> None:
    """Settings beside a GGUF file are not its own."""
    from tests.load.test_gguf import write_gguf

    write_gguf(tmp_path / "tiny.gguf")
    (tmp_path / "config.json").write_text("{}")
    plant_everywhere(tmp_path, mark)
    edit(tmp_path / "adapter_config.json", base_model_name_or_path="/nowhere", peft_type="LORA")
    run = amoeba("export", tmp_path / "tiny.gguf", "--shape", "4x1", "--out", tmp_path / "out")
    assert (run.code, mark.exists()) == (0, False), run.err


def test_the_runner_on_a_device_runs_only_what_was_sent(place: Place, tmp_path: Path, mark: Path) -> None:
    """The zip file has our class; the model's own file is not looked at, whatever it is."""
    pack_runner(tmp_path / "runner.zip")
    folder = place.artifact / "safetensors"
    (folder / "modeling_amoeba.py").write_text(code(mark))
    (folder / "torch.py").write_text(code(mark))
    job = {
        "engine": "torch",
        "options": {"device": "cpu", "compile": False, "threads": 1},
        "workload": {"prompt_tokens": 4, "generate_tokens": 4, "batch": 1},
        "rounds": 1,
        "time_limit_s": 600,
        "subjects": [{"id": 0, "folder": str(folder), "dtype": "float32", "random": False}],
    }
    (tmp_path / "job.json").write_text(json.dumps(job))
    done = subprocess.run(
        [sys.executable, "-m", "amoeba_runner", "--job", str(tmp_path / "job.json")],
        env={"PYTHONPATH": str(tmp_path / "runner.zip"), "PATH": os.environ["PATH"], "HOME": str(tmp_path)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
        input="",
    )
    events = [json.loads(line) for line in done.stdout.splitlines()]
    assert [event["event"] for event in events] == ["device", "result", "done"], events
    assert not mark.exists()


def test_a_config_cannot_choose_a_kernel_of_the_hub(place: Place) -> None:
    edit(place.model / "config.json", attn_implementation="kernels-community/flash-attn")
    assert read_config(place.model)._attn_implementation is None
    edit(place.model / "config.json", attn_implementation="eager")
    assert read_config(place.model)._attn_implementation == "eager"


def test_the_file_beside_the_weights_is_ours(place: Place) -> None:
    assert (place.artifact / "safetensors" / "modeling_amoeba.py").read_bytes() == modeling_file().read_bytes()


def test_no_module_of_ours_trusts_remote_code() -> None:
    """`opening.py` is the one way in; only the user's own snippet in a model card says what they may do."""
    package = modeling_file().parents[1]
    for path in package.rglob("*.py"):
        if path.name in ("modeling_amoeba.py", "sidecars.py", "foreign_code.py"):
            continue
        text = path.read_text()
        assert "trust_remote_code=True" not in text, path
        if path.name not in ("opening.py", "demo.py"):
            for call in ("AutoConfig.from_pretrained", "AutoTokenizer.from_pretrained", "ForCausalLM.from_"):
                assert call not in text, path
