"""The tokenizer of a model folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from amoeba_export.errors import InputError
from amoeba_export.model.opening import read_tokenizer
from amoeba_export.reading import panics_as_errors

_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")


def has_tokenizer(folder: Path) -> bool:
    """Whether a tokenizer is in a folder; whether it can be read, `open_tokenizer` says."""
    return any((folder / name).is_file() for name in _FILES)


def open_tokenizer(folder: Path) -> Any:
    """The tokenizer of a model folder, as transformers makes it. It has encoded a text by then.

    Raises:
        InputError: There is none, or one that cannot be read or does not encode.
    """
    try:
        with panics_as_errors():
            tokenizer = read_tokenizer(folder)
            tokenizer.encode("A text.", add_special_tokens=False, verbose=False)
    except Exception as error:  # transformers and its Rust library raise what they like
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise InputError(
            f"The model has no tokenizer that can be read: {reason}",
            where=folder,
            next_step="Put the tokenizer files of the model into its folder.",
        ) from error
    return tokenizer
