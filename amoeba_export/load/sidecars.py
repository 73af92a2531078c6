"""The files beside the weights: tokenizer, chat template, generation config."""

from __future__ import annotations

from pathlib import Path

from amoeba_export.reading import read_json_object

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)
GENERATION_CONFIG = "generation_config.json"


def check_sidecars(folder: Path) -> None:
    """Every JSON file beside the weights must be one: some formats read it, others copy it, and all runtimes need it.

    Raises:
        DamagedFile: One is not.
    """
    for name in (*TOKENIZER_FILES, GENERATION_CONFIG):
        path = folder / name
        if path.suffix == ".json" and path.is_file():
            read_json_object(path, what=f"The model's {name}", any_text=True)
