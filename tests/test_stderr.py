"""stderr is ours: no bar and no advice of the libraries below, in a log that a job keeps."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.load.test_gguf import write_gguf

LOUD = ("HF_HUB_DISABLE_PROGRESS_BARS", "TRANSFORMERS_VERBOSITY", "TRANSFORMERS_NO_ADVISORY_WARNINGS")


def run(folder: Path, code: str) -> str:
    """stderr of a process of its own, in which no setting of a user or of another test keeps libraries quiet."""
    env = {name: value for name, value in os.environ.items() if name not in LOUD} | {"AMOEBA_CACHE": str(folder)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, check=False)
    assert done.returncode == 0, done.stderr
    return done.stderr


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `demo` is: a GGUF file, which is unpacked first."""
    path = tmp_path_factory.mktemp("stderr") / "tiny.gguf"
    write_gguf(path)
    return path


def test_the_command_says_only_what_it_has_to_say(model: Path, tmp_path: Path) -> None:
    words = ["export", str(model), "--shape", "4x1", "--format", "safetensors,onnx", "--out", str(tmp_path / "out")]
    stderr = run(tmp_path / "cache", f"from amoeba_export.cli.app import main; raise SystemExit(main({words!r}))")
    summary, unpacking, *rest = stderr.splitlines()
    assert summary == f"{model}: shape 4x1 -> safetensors, onnx"
    assert unpacking.startswith(f"Unpacking tiny.gguf into {tmp_path / 'cache' / 'models'}")
    # steps that take long on a busy machine are named, with their time
    named = ("Writing safetensors, onnx", "Comparing with the masked", "Comparing tiny.gguf with llama.cpp")
    assert [line for line in rest if not line.startswith(named)] == []


def test_the_library_says_nothing_and_leaves_the_bars_of_others_alone(model: Path, tmp_path: Path) -> None:
    request = f"model={str(model)!r}, shape='4x1', formats=('safetensors',), out=Path({str(tmp_path / 'out')!r})"
    code = f"""
from pathlib import Path
from amoeba_export import ExportRequest, export
from transformers.utils import logging
export(ExportRequest({request}))
assert logging.is_progress_bar_enabled()
"""
    said = run(tmp_path / "cache", code).splitlines()
    assert [line for line in said if not line.startswith("Comparing tiny.gguf with llama.cpp")] == []


def test_fine_tuning_does_not_repeat_what_bitsandbytes_misses(tmp_path: Path) -> None:
    """peft imports it wherever it is installed."""
    pytest.importorskip("bitsandbytes")
    code = """
from amoeba_export.cli.app import main
assert main(["targets"]) == 0
import amoeba_export.finetune
"""
    said = run(tmp_path / "cache", code).splitlines()
    assert [line for line in said if not line.startswith("Comparing tiny.gguf with llama.cpp")] == []
