"""Commands as lists of words with placeholders. Nothing here is ever given to a shell."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable, Mapping
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, Field

from amoeba_export.errors import nearest

PATHS = ("artifact", "safetensors", "onnx", "gguf")
"""Files of the model on this machine. The last three are also the names of containers."""

KNOWN = (*PATHS, "prompt", "generate", "batch", "dtype", "id", "run", "work", "out")
"""Every placeholder: docs/targets.md says what each stands for."""

_PIECE = re.compile(r"\{\{|\}\}|\{([^{}]*)\}|[{}]")


def placeholders(words: Iterable[str]) -> set[str]:
    """The names between braces."""
    return {found[1] for word in words for found in _PIECE.finditer(word) if found[1] is not None}


def fill(word: str, values: Mapping[str, str]) -> str:
    """`word` with its placeholders replaced; `{{` and `}}` are braces."""
    return _PIECE.sub(lambda found: values[found[1]] if found[1] is not None else found[0][0], word)


def spelled(words: Iterable[str], *, longest: int = 500) -> str:
    """A command as people type it, to be read and not to be run."""
    text = shlex.join(words)
    return text if len(text) <= longest else f"{text[:longest]}..."


def _is_list(value: Any) -> Any:
    if isinstance(value, str):
        try:
            words = shlex.split(value)
        except ValueError:
            words = value.split()
        listed = ", ".join(f'"{word}"' for word in words)
        raise ValueError(f"a command is a list of words, not one text: [{listed}]")
    return value


def _is_known(word: str) -> str:
    for found in _PIECE.finditer(word):
        if found[0] in ("{", "}"):
            raise ValueError(f"'{word}' has a single brace; write {{{{ or }}}} for a brace")
        if found[1] is not None and found[1] not in KNOWN:
            listed = ", ".join(f"{{{name}}}" for name in KNOWN)
            raise ValueError(
                f"there is no placeholder {{{found[1]}}}.{nearest(found[1], KNOWN)} The known ones are {listed}; "
                "write {{ and }} for braces"
            )
    return word


def _is_plain(word: str) -> str:
    if placeholders([_is_known(word)]):
        raise ValueError(f"'{word}' has a placeholder, and this command runs without a model")
    return word


Template = Annotated[str, AfterValidator(_is_known)]
"""A text with placeholders."""

Words = Annotated[tuple[Template, ...], Field(min_length=1), BeforeValidator(_is_list)]
"""A command with placeholders."""

PlainWords = Annotated[
    tuple[Annotated[str, AfterValidator(_is_plain)], ...], Field(min_length=1), BeforeValidator(_is_list)
]
"""A command without placeholders."""
