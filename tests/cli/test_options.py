from __future__ import annotations

from pathlib import Path

import pytest

from amoeba_export.cli.options import model_or_default, split_commas
from amoeba_export.errors import DamagedFile, InputError


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    ("config", "model"),
    [
        (None, "demo"),
        ("", "demo"),
        ("[workload]\nprompt_tokens = 3\n", "demo"),
        ('[model]\npath = "models/mine"\n', "models/mine"),
        ('[model]\nid = "org/name"\n', "org/name"),
    ],
)
def test_the_model_left_out(config: str | None, model: str) -> None:
    if config is not None:
        Path("amoeba.toml").write_text(config)
    assert model_or_default(None) == model
    assert model_or_default("given") == "given"


@pytest.mark.parametrize("config", ['[model]\npath = "a"\nid = "b"\n', "[model]\npath = 3\n", 'model = "x"\n'])
def test_a_model_table_that_does_not_name_one_model(config: str) -> None:
    Path("amoeba.toml").write_text(config)
    with pytest.raises(InputError) as caught:
        model_or_default(None)
    assert str(caught.value) == (
        "[model] must name one model.\n"
        "  where: amoeba.toml\n"
        '  next:  Write path = "folder" or id = "org/name" below it.'
    )


def test_a_config_that_is_not_toml() -> None:
    Path("amoeba.toml").write_text("[model\n")
    with pytest.raises(DamagedFile, match="it is not TOML"):
        model_or_default(None)


def test_lists_are_split_at_commas() -> None:
    assert split_commas(None) is None
    assert split_commas("onnx, gguf,") == ("onnx", "gguf")
