"""The Python of `docs/run.md` runs: a small artifact is opened as the page says, in every runtime that is installed."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from amoeba_export.api import ExportRequest, export
from tests.formats.bpe import save_bpe
from tests.tiny import save_tiny

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/run.md").read_text(encoding="utf-8")
FROM_TRANSFORMERS = ("ONNX Runtime GenAI", "ONNX Runtime", "OpenVINO")
NEEDS = {"ONNX Runtime GenAI": "onnxruntime_genai", "OpenVINO": "openvino", "llama.cpp": "xllamacpp"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which `dist/small` and `dist/small-openvino` are what the page says."""
    root = tmp_path_factory.mktemp("run")
    save_bpe(save_tiny(root / "model"))
    formats = ("safetensors", "onnx", "gguf")
    whole = ExportRequest(
        model=str(root / "model"), shape="4x1", dtype="fp32", formats=formats, out=root / "dist/small"
    )
    export(whole)
    return root


def _blocks() -> dict[str, str]:
    """The Python of each section."""
    sections = re.split(r"^## ", PAGE, flags=re.MULTILINE)[1:]
    code = {
        section.splitlines()[0]: "\n".join(re.findall(r"^```python\n(.*?)^```$", section, re.MULTILINE | re.DOTALL))
        for section in sections
    }
    return {name: text for name, text in code.items() if text}


def _run(code: str, folder: Path) -> str:
    """What it prints. A process of its own: native servers do not always end with their threads."""
    script = f"{code}\nimport os, sys\nsys.stdout.flush()\nos._exit(0)\n"
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "no_proxy": "127.0.0.1"}
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=folder, env=environment, capture_output=True, text=True, timeout=3000
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_every_runtime_of_the_page_writes_what_transformers_writes(folder: Path) -> None:
    blocks = _blocks()
    assert list(blocks) == ["transformers", *FROM_TRANSFORMERS, "llama.cpp"]
    if not (folder / "dist/small-openvino").exists():
        export(
            ExportRequest(
                model=str(folder / "model"),
                shape="4x1",
                target="openvino-cpu",
                dtype="fp32",
                formats=("onnx",),
                out=folder / "dist/small-openvino",
            )
        )
    names = [name for name in FROM_TRANSFORMERS if name not in NEEDS or importlib.util.find_spec(NEEDS[name])]
    mark = "print('====')\n"
    printed = _run(mark.join(blocks[name] for name in ("transformers", *names)), folder)
    expected, *others = (text.strip("\n") for text in printed.split("====\n"))
    assert len(expected) > len("The capital of France is")
    for name, text in zip(names, others, strict=True):
        shorter = min(len(text), len(expected))
        assert shorter > len("The capital of France is"), name
        assert text[:shorter] == expected[:shorter], name


def test_llama_cpp_opens_the_file(folder: Path) -> None:
    pytest.importorskip("xllamacpp")
    assert _run(_blocks()["llama.cpp"], folder).strip()
