"""Names of weights and families stand in the families' TOML files: code asks for roles and facts."""

from __future__ import annotations

import ast
import re
import typing
from collections.abc import Iterator
from pathlib import Path

from amoeba_export.ir.family import Role
from amoeba_export.load.family_file import read_family, supported_families

PACKAGE = Path(__file__).parents[1] / "amoeba_export"

SPELLING = {
    "model/modeling_amoeba.py": "the model that travels beside the weights, and names its own",
    "load/upstream.py": "reads files of the published code, which name Llama's weights",
    "llama_cpp/architectures.py": "architectures of llama.cpp, whose names are those of families",
}
"""Modules that may spell names of weights or families, and why."""


def weight_words() -> set[str]:
    """Parts of the names of weights, such as `q_proj`, but for those that are roles or plain words."""
    modules = {
        name
        for file in map(read_family, supported_families())
        for name in (
            *(template.name for template in file.family.templates),
            *(fused.module for fused in file.family.fused),
            *(held.module for held in file.family.experts),
        )
    }
    parts = {part for name in modules for part in name.split(".")}
    return {part for part in parts if "_" in part or "norm" in part} - set(typing.get_args(Role)) - {"norm"}


def spelled(path: Path) -> Iterator[str]:
    """Names in code: attributes, and strings without a space. Sentences and docstrings are for readers."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    told = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            yield node.attr
        elif isinstance(node, ast.Constant) and id(node) not in told and " " not in str(node.value):
            yield str(node.value)


def compared(path: Path) -> Iterator[str]:
    """Strings that a condition compares something with."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Compare):
            for inner in ast.walk(node):
                if isinstance(inner, ast.Constant) and isinstance(inner.value, str):
                    yield inner.value


def modules() -> list[Path]:
    return [path for path in PACKAGE.rglob("*.py") if path.relative_to(PACKAGE).as_posix() not in SPELLING]


def test_code_asks_for_roles_and_spells_no_name_of_a_weight() -> None:
    words = weight_words()
    assert {"q_proj", "embed_tokens", "lm_head", "self_attn", "input_layernorm", "qkv_proj"} <= words
    pattern = re.compile(rf"\b(?:{'|'.join(map(re.escape, words))})\b")
    found = [
        f"{path.relative_to(PACKAGE)}: {name}" for path in modules() for name in spelled(path) if pattern.search(name)
    ]
    assert not found, found


def test_no_condition_compares_the_name_of_a_family() -> None:
    """`llama` and `gpt2` are kinds of tokenizers in a GGUF file, too."""
    families = set(supported_families())
    found = {
        (path.relative_to(PACKAGE).as_posix(), name)
        for path in modules()
        for name in compared(path)
        if name in families
    }
    assert found <= {("load/gguf/tokenizer.py", "llama")}, found
