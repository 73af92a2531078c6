"""`docs/python.md` is run from top to bottom: a public stage that it shows wrong, or not at all, fails here."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from amoeba_export import api, backends
from amoeba_export.artifact import read_manifest
from amoeba_export.cli.app import app
from amoeba_export.ir import Shape
from amoeba_export.load import read_strategy
from tests import imaginary
from tests.finetune.models import char_tokenizer
from tests.tiny import save_tiny

PAGE = (Path(__file__).parents[1] / "docs/python.md").read_text(encoding="utf-8")
STAGES = ("calibrate", "finetune", "evaluate", "search", "export", "verify", "bench", "profile", "build")


class Options(imaginary.Options):
    """Those of `cpu` too."""

    providers: tuple[str, ...] = ()


class Cpu(imaginary.Imaginary):
    """In the place of ONNX Runtime: a machine without a clock."""

    options_model = Options


CPU = Cpu()


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What the page says is there, and a `cpu` without a clock."""
    torch.set_num_threads(1)
    char_tokenizer(save_tiny(tmp_path / "model"))
    (tmp_path / "text.txt").write_text("A river runs to the sea. " * 20)
    lines = [json.dumps({"instruction": f"Say {i}.", "output": f"{i}!"}) for i in range(20)]
    (tmp_path / "data.jsonl").write_text("\n".join(lines))
    monkeypatch.setattr(backends, "BACKENDS", {**backends.BACKENDS, "onnxruntime": f"{__name__}:CPU"})
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_page_runs_and_its_stages_give_what_it_says(folder: Path) -> None:
    names: dict[str, Any] = {}
    for block in re.findall(r"^```python\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL):
        exec(compile(block, "docs/python.md", "exec"), names)

    assert names["strategy"].identity == read_strategy(folder / "strategy.safetensors").identity
    assert (names["strategy"].min_depth, names["strategy"].num_layers) == (3, 4)
    assert names["tuned"].steps == 2
    assert Shape(4, 1.0) in names["tuned"].losses
    shapes = [str(entry.shape) for entry in names["quality"].shapes]
    assert shapes == ["4x1", "4x0.75", "4x0.5", "3x1", "3x0.75", "3x0.5"]
    assert all(math.isfinite(entry.perplexity) for entry in names["quality"].shapes)
    assert (folder / "adapter" / "quality.json").is_file()
    manifest = read_manifest(folder / "small")
    assert names["result"].manifest == manifest
    assert manifest.latency is not None
    assert manifest.latency.measured_ms is not None
    assert names["verified"].verification == manifest.verification
    whole, small = names["benched"]
    assert small.comparison.ratio == pytest.approx(small.result.of("decode") / whole.result.of("decode"))
    assert 0 < small.comparison.ratio <= 0.75 + 1e-9
    assert json.loads((folder / "cpu.json").read_text())["dims"] == dict(names["table"].dims)
    assert [entry.status for entry in names["report"].entries] == ["built"]
    assert names["why"].startswith("No shape that the strategy knows meets decode p50 <= ")


def test_every_stage_is_public_documented_and_on_the_page() -> None:
    commands = {
        str(command.name or command.callback.__name__) for command in app.registered_commands if command.callback
    }
    for name in STAGES:
        assert name in commands
        assert f"| `amoeba {name}` | `{name}` |" in PAGE
        assert getattr(api, name).__doc__
    for name in api.__all__:
        assert getattr(api, name) is not None
