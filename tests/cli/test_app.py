from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable
from typing import Any

import pytest

from amoeba_export import __version__
from amoeba_export.cli import app as boundary
from amoeba_export.errors import TargetError
from tests.conftest import Run

Amoeba = Callable[..., Run]


def raising(error: BaseException) -> Callable[[], None]:
    def work() -> None:
        raise error

    return work


def test_version(amoeba: Amoeba) -> None:
    assert amoeba("--version") == Run(0, f"amoeba {__version__}\n", "")


def test_no_command_shows_the_help_and_is_a_usage_error(amoeba: Amoeba) -> None:
    run = amoeba()
    assert run.code == 2
    assert "Usage: amoeba [OPTIONS] COMMAND [ARGS]..." in run.out
    assert run.err == ""


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["exprt"], "error: No such command 'exprt'. Did you mean 'export'?\n  next:  'amoeba --help' shows"),
        (
            ["export", "--latncy", "1ms"],
            "error: No such option: --latncy",
        ),
        (["inspect"], "error: Missing argument 'FILE|DIR'.\n  next:  'amoeba inspect --help' shows"),
        (["export", "--batch", "two"], "error: Invalid value for '--batch': Input should be a valid integer"),
        (["export", "--percentile"], "error: Option '--percentile' requires an argument.\n"),
    ],
)
def test_what_typer_cannot_read_is_a_usage_error_in_our_words(amoeba: Amoeba, words: list[str], message: str) -> None:
    run = amoeba(*words)
    assert run.code == 2
    assert run.out == ""
    assert run.err.startswith(message)


def test_an_error_of_ours_is_its_text_and_its_code(amoeba: Amoeba, command: Any) -> None:
    command(raising(TargetError("The board is off.", where="jetson", next_step="Switch it on.")))
    assert amoeba("work") == Run(6, "", "error: The board is off.\n  where: jetson\n  next:  Switch it on.\n")


@pytest.mark.parametrize("words", [["--debug", "work"], ["work", "--debug"]])
def test_debug_works_anywhere_and_shows_the_traceback(amoeba: Amoeba, command: Any, words: list[str]) -> None:
    command(raising(TargetError("The board is off.")))
    run = amoeba(*words)
    assert run.code == 6
    assert run.err.startswith("Traceback (most recent call last):\n")
    assert run.err.endswith("error: The board is off.\n")


def test_a_bug_says_that_it_is_one(amoeba: Amoeba, command: Any) -> None:
    command(raising(ZeroDivisionError("division by zero")))
    assert amoeba("work") == Run(
        1,
        "",
        "error: This is a bug in amoeba: ZeroDivisionError: division by zero\n"
        "  next:  Run the same command with --debug, and report it with the traceback and 'amoeba doctor'.\n",
    )
    run = amoeba("work", "--debug")
    assert run.code == 1
    assert "Traceback" in run.err
    assert run.err.endswith("error: This is a bug in amoeba: ZeroDivisionError: division by zero\n")


def test_what_the_machine_refuses_is_no_bug(amoeba: Amoeba, command: Any) -> None:
    command(raising(PermissionError(errno.EACCES, "Permission denied", "/etc/shadow")))
    assert amoeba("work") == Run(
        3,
        "",
        "error: The system refused: Permission denied.\n"
        "  where: /etc/shadow\n"
        "  next:  Check the permissions, and run it again.\n",
    )


def test_a_full_disk_is_no_bug(amoeba: Amoeba, command: Any) -> None:
    command(raising(OSError(errno.ENOSPC, "No space left on device")))
    assert amoeba("work") == Run(3, "", "error: The disk is full.\n  next:  Free some space and run it again.\n")


@pytest.mark.parametrize("number", [errno.ENAMETOOLONG, errno.ENOTDIR, errno.EFBIG, errno.EMFILE, errno.EIO])
def test_other_refusals_say_what_to_look_at(amoeba: Amoeba, command: Any, number: int) -> None:
    command(raising(OSError(number, os.strerror(number), "x" * 300)))
    run = amoeba("work")
    assert run.code == 3
    assert run.err.startswith(f"error: The system refused: {os.strerror(number)}.\n  where: {'x' * 300}\n  next:  ")


def test_what_the_machine_refused_a_library_is_no_bug(amoeba: Amoeba, command: Any) -> None:
    command(raising(RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)")))
    assert amoeba("work").code == 3


def test_another_os_error_is_a_bug(amoeba: Amoeba, command: Any) -> None:
    command(raising(FileNotFoundError(errno.ENOENT, "No such file or directory", "x")))
    assert amoeba("work").code == 1


def test_runs_in_a_thread_where_no_handler_can_be_set(command: Any) -> None:
    codes = []
    command(lambda: None)
    thread = threading.Thread(target=lambda: codes.append(boundary.main(["work"])))
    thread.start()
    thread.join()
    assert codes == [0]
