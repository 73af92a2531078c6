"""Files beside the weights that are not what their names say are refused when the model is opened."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from amoeba_export.errors import DamagedFile
from amoeba_export.load import load_supernet
from amoeba_export.load.sidecars import GENERATION_CONFIG, TOKENIZER_FILES
from tests.load.test_lora import train

JSON = [name for name in (*TOKENIZER_FILES, GENERATION_CONFIG) if name.endswith(".json")]


@pytest.fixture
def folder(tiny_dirs: dict[str, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_dirs["llama"], tmp_path / "model"))


@pytest.mark.parametrize("name", JSON)
@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b'{"eos_token_id": 2,}', "not JSON (Expecting property name enclosed in double quotes"),
        (b"", "not JSON (Expecting value"),
        (b"\xff\x00", "not JSON ("),
        (b"[" * 100_000, "its lists and tables are nested more than"),
        (b"[1]", "not a JSON object"),
    ],
)
def test_the_file_is_named(folder: Path, name: str, content: bytes, reason: str):
    (folder / name).write_bytes(content)
    with pytest.raises(DamagedFile) as caught:
        load_supernet(str(folder))
    assert caught.value.exit_code == 3
    assert caught.value.where == str(folder / name)
    assert reason in caught.value.what


def test_good_ones_are_left_alone(folder: Path):
    for name in JSON:
        (folder / name).write_text("{}")
    (folder / "chat_template.jinja").write_text("{% for %}")
    load_supernet(str(folder))


def test_those_of_an_adapter_are_checked_where_they_are_used(folder: Path, tmp_path: Path):
    adapter = tmp_path / "adapter"
    train(adapter, words=140)
    (adapter / "tokenizer.json").write_text("{}")
    (adapter / "tokenizer_config.json").write_text("{,}")
    with pytest.raises(DamagedFile, match="not JSON"):
        load_supernet(str(folder), adapters=[adapter])
    train(adapter)
    load_supernet(str(folder), adapters=[adapter])
