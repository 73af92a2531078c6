"""Decisions have no second copy, and a word names one class. Where each is decided: ARCHITECTURE.md."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "amoeba_export"

WORDS = ("Batch", "Cache", "Cut", "Gate", "Measurement", "Objective", "Question", "Settings", "Subject")

TRACES = {
    r"\bAnswer:\"": "reading/questions.py",
    r"posix_fallocate|ftruncate": "reserved_file.py",
    r"shutil\.disk_usage\(.*free\) <": "reserved_file.py",
    r"\.part\b\"": "replacing.py",
    r"\"max\" if metric": "ir/metric.py",
    r"math\.atan2": "student_t.py",
    r"parse_constant": "reading/json_object.py",
    r"decode\(\"utf-8-sig\"\)": "reading/",
}
"""What a second copy of a decision would have in it, and the file that may."""


def having(pattern: str) -> list[str]:
    """The modules whose text has it."""
    return sorted(
        path.relative_to(PACKAGE).as_posix()
        for path in PACKAGE.rglob("*.py")
        if re.search(pattern, path.read_text(encoding="utf-8"), re.MULTILINE)
    )


@pytest.mark.parametrize("word", WORDS)
def test_a_word_names_one_class(word: str) -> None:
    """The options of a backend are its `Options`, each in its own module, and not asked here."""
    found = having(rf"^class _?{word}\b")
    assert len(found) == 1, found


@pytest.mark.parametrize("trace", TRACES)
def test_a_decision_has_no_second_copy(trace: str) -> None:
    found = having(trace)
    assert found
    assert all(file.startswith(TRACES[trace]) for file in found), found
