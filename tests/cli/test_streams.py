"""Streams that are closed, full, gone, or of few letters: the work is done, and the exit code tells how it went."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from amoeba_export.artifact import Staging, verify_checksums
from tests.conftest import Run

_MAIN = "import sys; from amoeba_export.cli.entry import entry; entry()"


def shell(line: str, *words: object, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a line of bash in which `amoeba` is this tree's, and "$@" are the words. The exit code is amoeba's."""
    defined = f'amoeba() {{ {sys.executable} -c "{_MAIN}" "$@"; }}; '
    return subprocess.run(
        ["bash", "-c", f"{defined}{line}; exit ${{PIPESTATUS[0]}}", "bash", *map(str, words)],
        capture_output=True,
        text=True,
        errors="surrogateescape",
        env=os.environ | environment,
        check=False,
    )


@pytest.mark.parametrize("words", [["targets", "--help"], ["targets", "list"], ["targets", "list", "--json"]])
def test_a_reader_that_has_seen_enough_is_no_error(words: list[str]) -> None:
    run = shell('amoeba "$@" | true', *words)
    assert (run.returncode, run.stderr) == (0, "")


def test_a_reader_of_everything_that_has_gone_ends_no_work(model: Path, tmp_path: Path) -> None:
    run = shell('amoeba export "$@" 2>&1 | head -1', model, "--shape", "4x1", "--out", tmp_path / "out")
    assert run.returncode == 0
    assert len(run.stdout.splitlines()) == 1
    assert verify_checksums(tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("line", ['amoeba "$@" | true', 'amoeba "$@" 2>&1 | true', 'amoeba "$@" >&- 2>&-'])
def test_an_error_keeps_its_exit_code(line: str, tmp_path: Path) -> None:
    assert shell(line, "inspect", tmp_path / "nothing").returncode == 3


def test_closed_streams(model: Path, tmp_path: Path) -> None:
    run = shell('amoeba export "$@" <&- >&- 2>&-', model, "--shape", "4x1", "--out", tmp_path / "out")
    assert run.returncode == 0
    assert verify_checksums(tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_an_answer_that_cannot_be_written_is_an_error() -> None:
    run = shell("amoeba targets list > /dev/full")
    assert (run.returncode, run.stderr) == (
        3,
        "error: The disk is full.\n  next:  Free some space and run it again.\n",
    )


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_talk_that_cannot_be_written_is_none(tmp_path: Path) -> None:
    assert shell('amoeba inspect "$@" 2> /dev/full', tmp_path / "nothing").returncode == 3


@pytest.mark.parametrize("environment", [{"PYTHONIOENCODING": "ascii"}, {"LC_ALL": "C", "PYTHONUTF8": "0"}])
def test_letters_that_a_stream_does_not_have(environment: dict[str, str], model: Path, tmp_path: Path) -> None:
    out = tmp_path / "é"
    run = shell('amoeba export "$@"', model, "--shape", "4x1", "--out", out, **environment)
    assert run.returncode == 0, run.stderr
    assert f"next: amoeba bench {tmp_path}" in run.stdout.replace("'", "")
    assert run.stdout.isascii()
    assert verify_checksums(out)


def test_a_name_that_is_not_utf_8(amoeba: Callable[..., Run], model: Path, tmp_path: Path) -> None:
    out = tmp_path / os.fsdecode(b"caf\xe9")
    for words in (
        ["export", model, "--shape", "4x1", "--out", out],
        ["export", out, "--shape", "4x1", "--out", tmp_path / "o"],
    ):
        run = amoeba(*words)
        assert (run.code, run.out) == (3, "")
        assert run.err.endswith(
            "error: This path is not UTF-8 text, and the libraries that read and write weights cannot open it.\n"
            f"  where: {tmp_path}/caf\\udce9\n"
            "  next:  Rename it, or give another path.\n"
        )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["x" * 255, "é" * 127])
def test_the_longest_names(name: str, tmp_path: Path) -> None:
    with Staging(tmp_path / name) as staging:
        assert staging.folder.is_dir()
        with Staging(tmp_path / name[:-1]):  # another one, which is not swept
            assert len(list(tmp_path.iterdir())) == 2
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", ["export", "calibrate", "finetune", "profile", "build"])
def test_a_name_that_is_too_long(
    command: str, amoeba: Callable[..., Run], model: Path, strategy: Path, tmp_path: Path
) -> None:
    name = tmp_path / ("x" * 300)
    words = {
        "export": [model, "--shape", "4x1", "--out", name],
        "calibrate": [model, "--out", name],
        "finetune": [model, "--strategy", strategy, "--data", strategy, "--out", name],
        "profile": [model, "--target", "cpu", "--out", name],
        "build": [name],
    }
    run = amoeba(command, *words[command])
    assert run.code == 3, run.err
    assert "File name too long" in run.err
    assert "\n  next:  " in run.err
    assert "bug" not in run.err
    assert [path.name for path in tmp_path.iterdir()] == ["inputs"]
