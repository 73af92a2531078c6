from __future__ import annotations

import os
from pathlib import Path

import pytest

from amoeba_export import leftovers
from amoeba_export.replacing import replace_text, replacing


@pytest.mark.parametrize("shared", [False, True])
def test_the_old_content_stays_until_the_new_one_is_whole(tmp_path: Path, shared: bool) -> None:
    path = tmp_path / "a.json"
    path.write_text("old")
    with replacing(path, shared=shared) as part:
        part.write_text("new")
        assert path.read_text() == "old"
        assert part.parent == tmp_path
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [("a.json", "new")]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_what_stops_half_way_leaves_nothing(tmp_path: Path, error: type[BaseException]) -> None:
    def write_half() -> None:
        with replacing(tmp_path / "a.json") as part:
            part.write_text("half")
            raise error

    with pytest.raises(error):
        write_half()
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_process_left_is_written_over(tmp_path: Path) -> None:
    (tmp_path / ".a.json.part").write_text("much longer than what comes")
    replace_text(tmp_path / "a.json", "new")
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [("a.json", "new")]


def test_the_part_of_a_process_that_is_ended_goes(tmp_path: Path) -> None:
    with replacing(tmp_path / "a.json", durable=False) as part:
        part.write_text("half")
        leftovers.remove_all()  # what a command that does not stop in time is ended with
        assert list(tmp_path.iterdir()) == []
        part.write_text("whole")
    leftovers.remove_all()
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [("a.json", "whole")]


def test_a_link_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "there" / "a.json")
    replace_text(tmp_path / "link", "new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "there" / "a.json").read_text() == "new"


def test_a_pipe_is_written_to_and_not_replaced(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    replace_text(tmp_path / "pipe", "new")
    assert os.read(reader, 10) == b"new"
    os.close(reader)
    assert (tmp_path / "pipe").is_fifo()
