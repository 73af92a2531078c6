"""Files that amoeba writes are valid by the schemas that the site publishes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from tests.conftest import Run
from tests.finetune.models import char_tokenizer
from tests.tiny import save_tiny

SCHEMAS = Path(__file__).parents[2] / "docs" / "schemas"


def _check(file: Path, schema: str) -> dict[str, Any]:
    data: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    rules = json.loads((SCHEMAS / f"{schema}.schema.json").read_text(encoding="utf-8"))
    jsonschema.Draft202012Validator.check_schema(rules)
    jsonschema.Draft202012Validator(rules).validate(data)
    return data


def test_what_a_build_writes_is_valid(
    amoeba: Callable[..., Run], tiny_dirs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    entry = '[[build]]\nname = "one"\nshape = "4x1"\ntarget = "jetson"\nformats = ["safetensors"]\ndtype = "fp32"\n'
    (tmp_path / "amoeba.toml").write_text(f'[model]\npath = "{tiny_dirs["llama"]}"\n{entry}')
    done = amoeba("build")
    assert done.code == 0, done.err
    manifest = _check(tmp_path / "dist/one/amoeba.json", "manifest")
    assert manifest["shape"]["depth"] == 4
    plan = _check(tmp_path / "dist/one/plan.json", "plan")
    assert len(plan["layers"]) == 4
    report = _check(tmp_path / "dist/build-report.json", "build-report")
    assert [one["name"] for one in report["entries"]] == ["one"]


def test_what_is_wrong_is_refused(tmp_path: Path) -> None:
    for content in (
        {},
        {"shape": "4x1", "policy": "odd", "layers": []},
        {"shape": 4, "policy": "uniform", "layers": []},
    ):
        (tmp_path / "plan.json").write_text(json.dumps(content))
        with pytest.raises(jsonschema.ValidationError):
            _check(tmp_path / "plan.json", "plan")


def test_measured_shapes_are_valid(amoeba: Callable[..., Run], tmp_path: Path) -> None:
    rules = json.loads((SCHEMAS / "quality.schema.json").read_text(encoding="utf-8"))
    items = [{"context": "a", "choices": ["b", "c"], "answer": 0}]

    char_tokenizer(save_tiny(tmp_path / "model"))
    (tmp_path / "text.txt").write_text("A river runs to the sea. " * 20)
    (tmp_path / "items.jsonl").write_text("\n".join(map(json.dumps, items)))
    out = tmp_path / "quality.json"
    words = ("evaluate", tmp_path / "model", "--text", tmp_path / "text.txt", "--window", 64)
    done = amoeba(*words, "--tasks", tmp_path / "items.jsonl", "--out", out)
    assert done.code == 0, done.err
    (shape,) = json.loads(out.read_text())["shapes"]
    jsonschema.Draft202012Validator(rules).validate(shape)
    assert shape["shape"] == "4x1"
    assert shape["tasks"]["items"]["num_items"] == 1
