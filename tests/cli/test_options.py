from __future__ import annotations

from pathlib import Path

import pytest

from amoeba_export.cli.options import model_or_default, split_commas
from amoeba_export.errors import BadConfig


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


@pytest.mark.parametrize(
    ("config", "problem"),
    [
        (
            '[model]\npath = "a"\nid = "b"\n',
            'line 1: [model] must name one model. Write either path = "folder" or id = "org/name".',
        ),
        ("[model]\npath = 3\n", "line 2: model.path: input should be a valid string, not 3. Correct the value."),
        (
            'model = "x"\n',
            "line 1: model must be a table. Write [model] on a line of its own, and its keys below.",
        ),
        ("[model\n", "Correct the line."),
    ],
)
def test_a_model_table_that_does_not_name_one_model(config: str, problem: str) -> None:
    Path("amoeba.toml").write_text(config)
    with pytest.raises(BadConfig) as caught:
        model_or_default(None)
    lines = str(caught.value).splitlines()
    assert lines[0] == "amoeba.toml has a mistake:"
    assert lines[1].endswith(problem)


def test_lists_are_split_at_commas() -> None:
    assert split_commas(None) is None
    assert split_commas("onnx, gguf,") == ("onnx", "gguf")
