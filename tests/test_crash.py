"""An export that is killed, or runs out of disk, leaves nothing or everything; the same inputs give the same bytes.

Each runs as a program of its own, with its own hash seed. Killed exports are forks of one, so that each costs only
what an export does.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from amoeba_export.artifact import verify_checksums
from amoeba_export.cli.app import main
from amoeba_export.load import load_supernet, write_strategy
from tests.formats.bpe import save_bpe
from tests.materialize.subnets import noise_strategy
from tests.tiny import save_tiny


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with a tokenizer in `model`, and a strategy for it."""
    root = tmp_path_factory.mktemp("inputs")
    save_bpe(save_tiny(root / "model", "llama"))
    write_strategy(noise_strategy(load_supernet(str(root / "model")).architecture), root / "strategy.safetensors")
    return root


def run_program(program: str, *arguments: object, **environment: str) -> Any:
    """Run a program of Python against this tree and read the JSON that it prints last."""
    finished = subprocess.run(
        [sys.executable, "-c", program, *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[1],
        env=os.environ | {"PYTHONPATH": ".", "OMP_NUM_THREADS": "1"} | environment,
        check=False,
        timeout=3000,
    )
    assert finished.returncode == 0, finished.stderr[-3000:]
    return json.loads(finished.stdout.splitlines()[-1])


_KILL = """
import json, os, random, shutil, signal, sys, time
from pathlib import Path
import onnx, onnxruntime, transformers  # once, not in every fork
from transformers.models.llama import modeling_llama
from amoeba_export import ExportRequest, export
from amoeba_export.artifact import verify_checksums

inputs, place = map(Path, sys.argv[1:])
out = place / "out"
model, strategy = str(inputs / "model"), inputs / "strategy.safetensors"
request = dict(model=model, strategy=strategy, shape="3x0.5", refit="off", out=out)

def start():
    # Nothing was computed here before: a fork has only the thread that made it, and would wait for the others.
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        export(ExportRequest(**request, formats=("safetensors", "onnx"), force=True))
        code = 0
    finally:
        os._exit(code)

def finish(child):
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

begun = time.perf_counter()
assert finish(start()) == 0
whole = time.perf_counter() - begun
moments, seen = random.Random(0), []
for number in range(12):
    replaces = number % 2 == 1  # every other one has an artifact to replace
    if not replaces:
        shutil.rmtree(out)
    child = start()
    time.sleep(moments.uniform(0, 1.05) * whole)
    os.kill(child, signal.SIGKILL)
    code = finish(child)
    there = out.exists()
    if there:
        verify_checksums(out)
    strangers = [path.name for path in place.iterdir() if path != out and not path.name.startswith(".out.amoeba-")]
    again = finish(start())
    verify_checksums(out)
    seen.append([code, replaces, there, strangers, again, sorted(path.name for path in place.iterdir())])
print(whole, file=sys.stderr)
print(json.dumps(seen))
"""


def test_a_kill_at_any_moment_leaves_a_whole_artifact_or_none(inputs: Path, tmp_path: Path) -> None:
    """Twelve moments of an export, every other one of an export that replaces an artifact."""
    seen = run_program(_KILL, inputs, tmp_path)
    assert len(seen) == 12
    assert sum(code == -9 for code, *_ in seen) >= 6  # the others had ended before
    for code, replaces, there, strangers, again, left in seen:
        assert code in (-9, 0)
        assert there or not (replaces or code == 0)
        assert (strangers, again, left) == ([], 0, ["out"])


def export_words(inputs: Path, out: Path, *words: object) -> list[str]:
    model, strategy = inputs / "model", inputs / "strategy.safetensors"
    return [
        str(word)
        for word in (
            "export",
            model,
            "--strategy",
            strategy,
            "--shape",
            "3x0.5",
            "--refit",
            "off",
            "--out",
            out,
            *words,
        )
    ]


@pytest.mark.parametrize(("name", "dtype"), [("safetensors", "fp32"), ("onnx", "fp32"), ("onnx", "int8")])
def test_a_disk_too_small_is_said_with_the_bytes_needed_and_nothing_is_left(
    inputs: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    name: str,
    dtype: str,
) -> None:
    usage = os.statvfs(tmp_path)
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 20_000, "total": usage.f_blocks}))
    assert main(export_words(inputs, tmp_path / "deep" / "out", "--format", name, "--dtype", dtype)) == 3
    said = capsys.readouterr().err
    assert "The disk is too full: " in said
    assert " bytes are needed and 20,000 are free." in said
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("room_kb", [128, 256, 384, 512])
def test_a_disk_that_is_really_full(
    inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], room_kb: int
) -> None:
    """A file system of its own. Two containers: with more room, the second is what does not fit, or what follows it."""
    small = tmp_path / "small"
    small.mkdir()
    mounting = ["mount", "-t", "tmpfs", "-o", f"size={room_kb}k", "tmpfs", str(small)]
    if subprocess.run(mounting, capture_output=True, check=False).returncode:
        pytest.skip("mounting a tmpfs is not permitted here")
    try:
        assert main(export_words(inputs, small / "out", "--format", "safetensors,onnx")) == 3
        said = capsys.readouterr().err
        assert " bytes are needed and " in said
        assert str(small) in said
        assert list(small.iterdir()) == []
    finally:
        subprocess.run(["umount", str(small)], check=True)


_WRITE = """
import json, sys, dataclasses
from pathlib import Path
from amoeba_export import ExportRequest, export
from amoeba_export.artifact.checksums import list_files
from amoeba_export.formats.write import write_formats
from amoeba_export.ir import Shape
from amoeba_export.ir.derive import CutRules, derive_plan
from amoeba_export.load import load_supernet
from amoeba_export.materialize import materialize_subnet
from tests.materialize.subnets import noise_adapter

inputs, place = map(Path, sys.argv[1:])
model, strategy = inputs / "model", inputs / "strategy.safetensors"
supernet = load_supernet(str(model), strategy=strategy)
supernet = dataclasses.replace(supernet, adapters=(noise_adapter(supernet),))
found = {}
plan = derive_plan(supernet.strategy, supernet.architecture, Shape.parse("4x0.7"), CutRules(policy="adaptive"))
for name, dtypes, options in (
    ("safetensors", ("fp32", "fp16", "bf16"), {}),
    ("onnx", ("fp32", "fp16", "int8", "int4"), {"dialect": "ort"}),
    ("onnx", ("fp32", "fp16"), {"dialect": "standard"}),
    ("gguf", ("fp32", "fp16", "int8", "int4"), {}),
):
    for dtype in dtypes:
        folder = place / "-".join([name, dtype, *options.values()])
        folder.mkdir()
        write_formats(materialize_subnet(supernet, plan), folder, {name: dtype}, options={name: options})
        found[folder.name] = {file.path: file.sha256 for file in list_files(folder)}
request = ExportRequest(model=str(model), strategy=strategy, shape="3x0.5", refit="off", out=place / "out")
export(dataclasses.replace(request, formats=("safetensors", "onnx")))
whole = {file.path: file.sha256 for file in list_files(place / "out")}
del whole["amoeba.json"]
found["export"] = whole
print(json.dumps(found))
"""


def differing(one: Path, other: Path) -> list[str]:
    """Which files differ, and of an ONNX model which tensors, and by how much."""
    said = []
    for path in sorted(path for path in one.rglob("*") if path.is_file()):
        there = other / path.relative_to(one)
        if there.is_file() and path.read_bytes() == there.read_bytes():
            continue
        said.append(str(path.relative_to(one)))
        if path.name == "model.onnx.data" and there.is_file():
            models = (onnx.load(folder.with_name("model.onnx")).graph.initializer for folder in (path, there))
            for tensors in zip(*models, strict=True):
                a, b = (onnx.numpy_helper.to_array(tensor).astype(np.float64) for tensor in tensors)
                if (a != b).any():
                    said.append(f"{tensors[0].name} {a.shape}: {(a != b).sum()} by up to {np.abs(a - b).max():.3g}")
    return said


def test_the_same_inputs_give_the_same_files_in_another_process(inputs: Path, tmp_path: Path) -> None:
    """Every container, dialect and dtype, with an adapter; and a whole export, all but its manifest."""
    first, second = tmp_path / "first", tmp_path / "second"
    first.mkdir()
    second.mkdir()
    found = run_program(_WRITE, inputs, first, PYTHONHASHSEED="1")
    again = run_program(_WRITE, inputs, second, PYTHONHASHSEED="2", OMP_NUM_THREADS="2")
    assert found == again, [differing(first / name, second / name) for name in found if found[name] != again[name]]
    assert len(found) == 14
    assert set(found["export"]) >= {"plan.json", "provenance.json", "safetensors/config.json", "onnx/model.onnx.data"}
    assert verify_checksums(first / "out").files == verify_checksums(second / "out").files
