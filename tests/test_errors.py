from __future__ import annotations

import ast
import inspect
import re
from pathlib import Path

import pytest

import amoeba_export
from amoeba_export import errors
from amoeba_export.errors import AmoebaError, BadValue, NotFound, Problems, UnknownName, WrongModel, nearest

KINDS = AmoebaError.__subclasses__()
MISTAKES = [mistake for kind in KINDS for mistake in kind.__subclasses__()]


def test_every_kind_has_an_exit_code_of_its_own() -> None:
    assert {kind.__name__: kind.exit_code for kind in KINDS} == {
        "UsageError": 2,
        "InputError": 3,
        "BudgetError": 4,
        "VerificationError": 5,
        "TargetError": 6,
        "UnsupportedError": 7,
    }


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_has_the_code_of_its_kind_and_says_what_it_is(mistake: type[AmoebaError]) -> None:
    assert mistake.exit_code == mistake.__mro__[1].exit_code  # type: ignore[attr-defined]
    assert mistake.__doc__
    assert not mistake.__subclasses__()


def test_every_mistake_names_a_next_step() -> None:
    """`Problems` lists mistakes that each have one."""
    tree = ast.parse(inspect.getsource(errors))
    silent = []
    for node in tree.body:
        if not isinstance(node, ast.ClassDef) or node.name not in {mistake.__name__ for mistake in MISTAKES}:
            continue
        calls = [
            call
            for call in ast.walk(node)
            if isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute) and call.func.attr == "__init__"
        ]
        if not any(keyword.arg == "next_step" for call in calls for keyword in call.keywords):
            silent.append(node.name)
    assert silent == ["Problems"]


def test_every_mistake_is_made_somewhere() -> None:
    package = Path(amoeba_export.__file__).parent
    source = "\n".join(path.read_text() for path in package.rglob("*.py") if path.name != "errors.py")
    assert [mistake.__name__ for mistake in MISTAKES if not re.search(rf"\b{mistake.__name__}\(", source)] == []


def test_an_error_reads_in_full() -> None:
    assert str(AmoebaError("It broke.")) == "It broke."
    assert str(AmoebaError("It broke.", where=Path("a/b"), next_step="Mend it.")) == (
        "It broke.\n  where: a/b\n  next:  Mend it."
    )


def test_a_wrong_name_comes_with_the_nearest_one() -> None:
    assert nearest("jetsn", ["cpu", "jetson"]) == " Did you mean 'jetson'?"
    assert nearest("xyz", ["cpu", "jetson"]) == ""
    assert str(UnknownName("target", "jetsn", ["jetson", "cpu"])) == (
        "There is no target named 'jetsn'. Did you mean 'jetson'?\n  next:  Choose one of: cpu, jetson."
    )


def test_several_problems_are_numbered_and_the_first_one_decides_the_code() -> None:
    error = Problems([NotFound("The plan", "p.json"), BadValue("--batch", "0", "a whole number above 0")])
    assert error.exit_code == 3
    assert str(error) == (
        "2 settings are wrong:\n"
        "  1. The plan was not found: p.json\n"
        "  2. --batch cannot be '0'.\n"
        "  next:  Give a whole number above 0."
    )


def test_what_belongs_to_another_model_says_how_it_differs() -> None:
    assert str(WrongModel("The strategy", ["num_layers is 8 there and 4 here"], where="s.safetensors")) == (
        "The strategy was made for another model: num_layers is 8 there and 4 here.\n"
        "  where: s.safetensors\n"
        "  next:  Use the strategy that belongs to this model, or make a new one."
    )


def test_half_characters_of_a_damaged_name_are_spelled_out() -> None:
    assert str(AmoebaError("It has \udc80.", where="a\ud800")).encode() == b"It has \\udc80.\n  where: a\\ud800"
