"""`amoeba verify` on what is not as it was written, and on artifacts with adapters."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from amoeba_export.artifact import MANIFEST_NAME, file_entry, read_manifest
from tests.conftest import Run
from tests.load.test_lora import train

Amoeba = Callable[..., Run]


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    train(tmp_path / "tuned" / "style")
    return tmp_path / "tuned" / "style"


@pytest.fixture
def artifact(amoeba: Amoeba, model: Path, strategy: Path, tmp_path: Path) -> Path:
    words = ("--shape", "3x0.75", "--strategy", strategy, "--format", "safetensors")
    assert amoeba("export", model, *words, "--out", tmp_path / "a").code == 0
    return tmp_path / "a"


def change_json(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


def fix_checksums(artifact: Path) -> None:
    """Manifest and statement say what the files are now, as a careless or hostile tool would leave them."""
    manifest = read_manifest(artifact)
    entries = [file_entry(artifact / file.path, artifact) for file in manifest.files if file.path != "provenance.json"]
    statement = artifact / "provenance.json"
    statement.write_text(manifest.provenance(entries))
    files = sorted((*entries, file_entry(statement, artifact)), key=lambda file: file.path)
    (artifact / MANIFEST_NAME).write_text(manifest.with_files(files).to_text())


def test_an_adapter_is_found_where_its_name_says(
    amoeba: Amoeba, model: Path, strategy: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ("--shape", "3x0.75", "--strategy", strategy, "--format", "safetensors", "--adapter", adapter)
    assert amoeba("export", model, *words, "--out", tmp_path / "a").code == 0
    verify = ("verify", tmp_path / "a", "--model", model, "--strategy", strategy)
    monkeypatch.chdir(tmp_path)
    missing = amoeba(*verify)
    assert missing.code == 3
    assert missing.err.splitlines()[-2:] == [
        "error: The adapter that the artifact was cut with was not found: style, sha256 "
        + read_manifest(tmp_path / "a").inputs[1].sha256,
        "  next:  Say where it is with --adapter style.",
    ]
    assert amoeba(*verify, "--adapter", adapter).code == 0
    monkeypatch.chdir(adapter.parent)
    assert amoeba(*verify).code == 0

    other = shutil.copytree(adapter, tmp_path / "adapters" / "style")
    change_json(other / "adapter_config.json", lambda config: config.update(lora_alpha=8))
    monkeypatch.chdir(tmp_path)
    assert "(what is there by that name is another one)" in amoeba(*verify).err
    given = amoeba(*verify, "--adapter", other)
    assert given.code == 3
    assert "The artifact was cut from something else: it was cut with the adapter style (" in given.err


@pytest.mark.parametrize(
    ("formats", "dtype"), [("gguf", "fp16"), ("safetensors,onnx,gguf", "fp32"), ("gguf,onnx", "fp16")]
)
def test_formats_in_dtypes_of_their_own_are_as_they_were_written(
    formats: str, dtype: str, amoeba: Amoeba, model: Path, tmp_path: Path
) -> None:
    """Without --dtype, GGUF is fp16 and ONNX fp32: the manifest says what the first is."""
    assert amoeba("export", model, "--shape", "4x1", "--format", formats, "--out", tmp_path / "a").code == 0
    assert read_manifest(tmp_path / "a").dtype == dtype
    run = amoeba("verify", tmp_path / "a", "--model", model)
    assert run.code == 0, run.err


@pytest.mark.parametrize(
    ("name", "change", "problem"),
    [
        ("amoeba.json", lambda data: data["shape"]["layers"][0].update(ffn=7), "amoeba.json says other layers and"),
        ("amoeba.json", lambda data: data["dims"].update(rope_theta=5e5), "says rope_theta = 500000.0, the model has"),
        ("amoeba.json", lambda data: data.update(dtype="fp16"), "is in fp32, and amoeba.json says fp16"),
        ("amoeba.json", lambda data: data.update(model="other"), "says model other and names 1 as input"),
        ("plan.json", lambda data: data["layers"][0]["ffn"].reverse(), "neurons are not sorted and unique"),
        ("plan.json", lambda data: data.update(model_id="00" * 32), "is for the model 000000000000, which amoeba.json"),
        ("plan.json", lambda data: data["layers"][0].update(source_layer=9), "is not valid"),
    ],
)
def test_a_story_that_does_not_hold(
    amoeba: Amoeba,
    model: Path,
    strategy: Path,
    artifact: Path,
    name: str,
    change: Callable[[dict[str, Any]], None],
    problem: str,
) -> None:
    change_json(artifact / name, change)
    fix_checksums(artifact)
    run = amoeba("verify", artifact, "--model", model, "--strategy", strategy)
    assert run.code == 3
    assert problem in run.err


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda data: data["shape"].update(depth=2), "its shape has a depth of 2 and 3 layers"),
        (lambda data: data["dims"].update(hidden_size="96"), "dims.hidden_size is '96', not a whole number"),
        (lambda data: data["dims"].pop("ffn_size"), "it is not a manifest (dims has no key 'ffn_size')"),
    ],
)
def test_a_manifest_that_is_none(
    amoeba: Amoeba, artifact: Path, change: Callable[[dict[str, Any]], None], problem: str
) -> None:
    change_json(artifact / "amoeba.json", change)
    run = amoeba("verify", artifact, "--checksums-only")
    assert run.code == 3
    assert problem in run.err


def test_a_tokenizer_of_another_model(amoeba: Amoeba, model: Path, strategy: Path, artifact: Path) -> None:
    path = artifact / "safetensors" / "generation_config.json"
    change_json(path, lambda data: data.update(eos_token_id=5))
    fix_checksums(artifact)
    run = amoeba("verify", artifact, "--model", model, "--strategy", strategy)
    assert run.code == 3
    assert "safetensors/generation_config.json is not that of the model" in run.err
