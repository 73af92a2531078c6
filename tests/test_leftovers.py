"""Temporary files go with their process, however it ends."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from amoeba_export import leftovers

HELD = """
import os, signal, subprocess, sys, tempfile
from amoeba_export import leftovers
with leftovers.temporary_folder() as folder:
    (folder / "states").mkdir()
    (folder / "states" / "0").write_bytes(bytes(1000))
    child = "import tempfile; print(tempfile.mkdtemp())"
    print(folder, tempfile.mkdtemp(), subprocess.check_output([sys.executable, "-c", child], text=True), flush=True)
    sys.stdin.readline()
"""


def wait_until_empty(folder: Path) -> None:
    """Who removes it is another process. A test that waits for ever fails by its limit."""
    while list(folder.iterdir()):
        time.sleep(0.01)


@pytest.fixture
def holder(tmp_path: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", HELD],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[1],
        env=os.environ | {"TMPDIR": str(tmp_path)},
    )


@pytest.mark.parametrize("end", ["kill", "unwind"])
def test_a_folder_for_temporary_files_goes_with_its_process(
    holder: subprocess.Popen[str], tmp_path: Path, end: str
) -> None:
    assert holder.stdout is not None
    folder, own, a_childs = map(Path, holder.stdout.readline().split())
    assert own.parent == a_childs.parent == folder
    assert folder.parent == tmp_path
    if end == "kill":
        holder.kill()
    holder.communicate("\n")
    assert holder.returncode == (-9 if end == "kill" else 0)
    wait_until_empty(tmp_path)


def test_the_folder_is_this_processes_only_inside(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.delenv("TMPDIR", raising=False)
    with leftovers.temporary_folder() as folder:
        assert os.environ["TMPDIR"] == tempfile.gettempdir() == str(folder)
    assert "TMPDIR" not in os.environ
    assert tempfile.gettempdir() == str(tmp_path)
    assert list(tmp_path.iterdir()) == []
