from __future__ import annotations

import pytest

from amoeba_export.cli.app import main


@pytest.mark.parametrize(
    ("line", "offered"),
    [
        ("amoeba exp", "export\n"),
        ("amoeba export --target je", "jetson\njetson-orin-nano\n"),
        ("amoeba export --format onnx,", "onnx,safetensors\nonnx,gguf\n"),
        ("amoeba export --format s", "safetensors\n"),
        ("amoeba export --policy ", "uniform\nadaptive\n"),
        ("amoeba export --metric p", "prefill\n"),
        ("amoeba export --dtype int", "int8\nint4\n"),
        ("amoeba calibrate --recipe q", "quick\n"),
        ("amoeba targets ch", "check\n"),
        ("amoeba targets show c", "cpu\n"),
    ],
)
def test_the_shell_offers(
    line: str, offered: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("_AMOEBA_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", line)
    monkeypatch.setenv("COMP_CWORD", str(line.count(" ")))
    assert main([]) == 0
    given = set(capsys.readouterr().out.splitlines())
    assert given >= set(offered.splitlines())
    last = line.rpartition(" ")[2]
    assert all(name.startswith(last) for name in given)
