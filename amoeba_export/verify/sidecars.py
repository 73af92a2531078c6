"""The files beside the weights that decide what text becomes: they must be the supernet's own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from amoeba_export.ir import Supernet

_WHOLE = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "merges.txt", "added_tokens.json")
"""Compared as they are: as JSON where they are JSON."""

_SAYS_NOTHING = ("transformers_version", "_from_model_config", "name_or_path", "tokenizer_file", "backend", "auto_map")
"""Keys of a config that only say who wrote it, or name code, which is never copied and refused where it is found."""

_NEW_CLASS, _OLD_CLASS = "TokenizersBackend", "PreTrainedTokenizerFast"
"""One class: transformers 5 has both names for it, 4 the second alone."""

_GENERATION = "generation_config.json"

_SETTINGS = (
    *("tokenizer_config.json", "special_tokens_map.json", _GENERATION),
    *("chat_template.json", "chat_template.jinja"),
)


def sidecar_problems(folder: Path, supernet: Supernet) -> list[str]:
    """What differs between the tokenizer and settings of a format and those of the supernet, in words.

    A container without such files (GGUF has its tokenizer inside) has nothing to compare.
    """
    if not any((folder / name).is_file() for name in (*_WHOLE, "config.json")):
        return []
    problems = []
    for name in (*_WHOLE, *_SETTINGS):
        source = supernet.folder if name == _GENERATION else supernet.text_folder
        here, there = folder / name, source / name
        if here.is_file() != there.is_file():
            problems.append(f"{name} is {'not in the model' if here.is_file() else 'missing'}")
        elif here.is_file() and _content(here) != _content(there):
            problems.append(f"{name} is not that of the model")
    return problems


def _content(path: Path) -> Any:
    """The bytes, or for JSON what they mean, less what means nothing."""
    data = path.read_bytes()
    try:
        content = json.loads(data)
    except (ValueError, RecursionError):
        return data
    if isinstance(content, dict) and path.name in _SETTINGS:
        content = {key: value for key, value in content.items() if key not in _SAYS_NOTHING}
        if content.get("tokenizer_class") == _NEW_CLASS:
            content["tokenizer_class"] = _OLD_CLASS
    return content
