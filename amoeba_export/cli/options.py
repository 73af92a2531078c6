"""Arguments and options that several commands share, with their help, defaults and completion."""

from __future__ import annotations

import tomllib
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

import typer

from amoeba_export.errors import DamagedFile, InputError

CONFIG_NAME = "amoeba.toml"


def complete_targets(incomplete: str) -> list[tuple[str, str]]:
    """Target names and aliases, with what they are."""
    from amoeba_export.backends.targets import list_targets

    names = {name: target.description for target in list_targets().values() for name in (target.name, *target.aliases)}
    return [(name, text) for name, text in sorted(names.items()) if name.startswith(incomplete)]


def complete_formats(incomplete: str) -> list[str]:
    """Formats, one after the other: after `onnx,` come the ones that are left."""
    from amoeba_export.formats import FORMATS

    before, comma, last = incomplete.rpartition(",")
    taken = before.split(",")
    return [f"{before}{comma}{name}" for name in FORMATS if name.startswith(last) and name not in taken]


def complete_from(names: Iterable[str]) -> object:
    """Completion out of a fixed list."""
    known = tuple(names)
    return lambda incomplete: [name for name in known if name.startswith(incomplete)]


def split_commas(text: str | None) -> tuple[str, ...] | None:
    """`onnx,gguf` as its parts; None for None."""
    if text is None:
        return None
    return tuple(part.strip() for part in text.split(",") if part.strip())


def model_or_default(model: str | None) -> str:
    """`model`; left out, the `[model]` table of amoeba.toml in the working directory, else `demo`.

    Raises:
        DamagedFile: amoeba.toml is not TOML.
        InputError: Its `[model]` table names nothing, or two things.
    """
    if model is not None:
        return model
    path = Path(CONFIG_NAME)
    if not path.is_file():
        return "demo"
    try:
        section = tomllib.loads(path.read_text(encoding="utf-8")).get("model", {})
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise DamagedFile(path, f"it is not TOML ({error})", next_step="Correct the file.") from error
    if not section:
        return "demo"
    given = [section[key] for key in ("path", "id") if key in section] if isinstance(section, dict) else []
    if len(given) != 1 or not isinstance(given[0], str):
        raise InputError(
            "[model] must name one model.", where=path, next_step='Write path = "folder" or id = "org/name" below it.'
        )
    return given[0]


Model = Annotated[
    str | None,
    typer.Argument(
        help="A model folder, a hub id, or demo. Left out: the one of amoeba.toml, else demo.", show_default=False
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print the answer as JSON on stdout.")]
Adapters = Annotated[
    list[Path] | None,
    typer.Option("--adapter", metavar="DIR", help="A LoRA or SMoL adapter to merge in. Repeat for several, in order."),
]
StrategyFile = Annotated[
    Path | None,
    typer.Option("--strategy", metavar="F", help="What calibration found. Left out: calibrated quickly, and kept."),
]
