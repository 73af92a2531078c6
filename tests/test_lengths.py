"""Modules and functions are short, or say where they are defined why they are not: `Long on purpose: REASON`."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("amoeba_export", "benchmarks", "docs")

MODULE_LINES = 300
FUNCTION_LINES = 60
PARAMETERS = 8

REASON = re.compile(r"\bLong on purpose: \w+")
COMMANDS = re.compile(r"\bCommands are long on purpose: \w+")
"""In the head of a module: holds for all of its functions, and not for the module."""

COPIED = "amoeba_export/model/modeling_amoeba.py"
"""Written beside weights byte by byte, and one file for that reason; some signatures are those of transformers."""


def too_long(source: str) -> Iterator[str]:
    """What exceeds a limit without a reason: `module`, or a function's name, and by what."""
    lines, tree = source.splitlines(), ast.parse(source)
    head = "\n".join(lines[: tree.body[1].lineno - 1]) if len(tree.body) > 1 else source
    if len(lines) > MODULE_LINES and not REASON.search(head):
        yield f"module: {len(lines)} lines"
    if COMMANDS.search(head):
        return
    for node in ast.walk(tree):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        assert node.end_lineno is not None
        own = lines[node.lineno - 1 : node.end_lineno]
        names = [arg.arg for arg in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
        count = len(names) - (names[:1] in (["self"], ["cls"]))
        if (len(own) > FUNCTION_LINES or count > PARAMETERS) and not REASON.search("\n".join(own)):
            yield f"{node.name}: {len(own)} lines, {count} parameters"


def test_what_is_long_says_why() -> None:
    files = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py") if path != ROOT / COPIED]
    found = {
        f"{path.relative_to(ROOT).as_posix()}, {what}"
        for path in files
        for what in too_long(path.read_text(encoding="utf-8"))
    }
    assert len(files) > 100
    assert sorted(found) == []


LONG = "    pass\n" * 60
WIDE = ", ".join("abcdefghi")


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("x = 1\n" * 301, ["module: 301 lines"]),
        ("x = 1\n" * 300, []),
        ('"""A list.\n\nLong on purpose: one list.\n"""\n' + "x = 1\n" * 301, []),
        (f"def f():\n{LONG}", ["f: 61 lines, 0 parameters"]),
        (f"def f():\n{LONG[9:]}", []),
        (f"def f():\n    # Long on purpose: one table.\n{LONG}", []),
        (f'"""Long on purpose: one list."""\ndef f():\n{LONG}', ["f: 61 lines, 0 parameters"]),
        (f"def f({WIDE}): ...\n", ["f: 1 lines, 9 parameters"]),
        (f"def f({WIDE[3:]}): ...\n", []),
        (f"class C:\n    async def f(self, *, {WIDE}): ...\n", ["f: 1 lines, 9 parameters"]),
        (f"class C:\n    def f(self, {WIDE[3:]}): ...\n", []),
        (f'"""Commands are long on purpose: flags."""\ndef f({WIDE}): ...\n', []),
        (f'"""Commands are long on purpose: flags."""\ndef f({WIDE}): ...\n' + "x = 1\n" * 300, ["module: 302 lines"]),
        (f"def f({WIDE}):\n    # Long on purpose:\n    pass\n", ["f: 3 lines, 9 parameters"]),
    ],
)
def test_what_is_too_long(source: str, found: list[str]) -> None:
    """A reason has words, and a module's does not hold for its functions, unless they are commands."""
    assert list(too_long(source)) == found
