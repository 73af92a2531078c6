"""Recipe files: TOML tables that become settings, shipped by name or given by path."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from amoeba_export.errors import InputError, UnknownName, nearest
from amoeba_export.locations import data_dir
from amoeba_export.model.data import DataRecipe
from amoeba_export.reading import read_toml

_Recipe = TypeVar("_Recipe", bound=BaseModel)
_Data = TypeVar("_Data", bound=DataRecipe)


def recipe_dir(kind: str) -> Path:
    """The folder of shipped recipes: `calibration/` itself, or a folder in it such as `refit`."""
    return data_dir("calibration") / kind


def shipped(kind: str) -> tuple[str, ...]:
    """Names of the shipped recipes of a kind."""
    return tuple(sorted(path.stem for path in recipe_dir(kind).glob("*.toml")))


def read_recipe(model: type[_Recipe], name_or_path: str | Path, *, kind: str) -> tuple[_Recipe, Path]:
    """Read a shipped recipe by name, or a TOML file by path; with the file that it came from.

    Args:
        model: What the tables become. Its `name` is the file's.
        name_or_path: A name of `shipped`, or a path that ends in `.toml`.
        kind: Where shipped ones lie.

    Raises:
        UnknownName: No recipe has that name.
        NotFound: There is no such file.
        InputError: The file is not TOML, or has settings that make no sense: all of them are named.
    """
    path = Path(name_or_path)
    if path.suffix != ".toml":
        if str(name_or_path) not in shipped(kind):
            raise UnknownName("recipe", str(name_or_path), shipped(kind))
        path = recipe_dir(kind) / f"{name_or_path}.toml"
    tables = read_toml(path, what="The recipe")
    try:
        return model.model_validate({**tables, "name": path.stem}), path
    except ValidationError as error:
        problems = "; ".join(_problem(detail, _settings(model)) for detail in error.errors())
        raise InputError(
            f"The recipe has settings that cannot be used: {problems}.",
            where=path,
            next_step="Correct them; docs/toml.md lists every setting.",
        ) from error


def located(data: _Data, recipe: Path) -> _Data:
    """The same with `file` made independent of the working directory: it is relative to its recipe."""
    return data if data.file is None else data.model_copy(update={"file": str((recipe.parent / data.file).resolve())})


def _problem(detail: Mapping[str, Any], settings: list[str]) -> str:
    key = ".".join(map(str, detail["loc"]))
    if detail["type"] == "extra_forbidden":
        hint = nearest(key.split(".")[-1], settings).strip()
        return f"{key} is not a setting{f' ({hint})' if hint else ''}"
    message = detail["msg"].removeprefix("Value error, ")
    return f"{key}: {message[0].lower()}{message[1:]}" if key else message


def _settings(model: type[BaseModel]) -> list[str]:
    """Names of all settings of a recipe and of the tables in it."""
    names = []
    for name, field in model.model_fields.items():
        names.append(name)
        table = field.annotation
        if isinstance(table, type) and issubclass(table, BaseModel):
            names.extend(_settings(table))
    return names
