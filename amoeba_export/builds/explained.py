"""What pydantic finds wrong in an `amoeba.toml`, in our words, and how a check goes on without it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel

from amoeba_export.builds.config import BuildEntry, BuildFile, ModelTable, Shared, WorkloadTable
from amoeba_export.builds.positions import Path as Place
from amoeba_export.errors import nearest


def explained(detail: Mapping[str, Any], place: Place) -> tuple[str, str]:
    """What pydantic found, and the fix, in our words."""
    kind, key = detail["type"], ".".join(str(part) for part in place if isinstance(part, str))
    if kind == "extra_forbidden":
        known = keys_at(place[:-1])
        return f"{key}: there is no such key.{nearest(str(place[-1]), known)}".rstrip("."), choices(known)
    if kind == "missing":
        return f"{key} is missing", f'Add {place[-1]} = "..."'
    if kind == "literal_error":
        return f"{key} cannot be {detail['input']!r}", f"Choose {detail['ctx']['expected']}"
    if kind == "string_pattern_mismatch":
        return f"{key} cannot be {detail['input']!r}", "Use letters, digits, '.', '_' and '-', a letter or digit first"
    if kind == "model_type":
        brackets = f"[[{key}]]" if isinstance(place[-1], int) else f"[{key}]"
        return f"{key} must be a table", f"Write {brackets} on a line of its own, and its keys below"
    wrong = detail["msg"][0].lower() + detail["msg"][1:]
    if kind == "tuple_type":
        table = place == ("build",)
        return (
            f"{key} must be a list",
            "Write [[build]] with double brackets" if table else f'Write {place[-1]} = ["..."]',
        )
    return f"{key}: {wrong}, not {detail['input']!r}", "Correct the value"


def table_at(data: Any, place: Place) -> Any:
    """What stands at `place`."""
    for part in place:
        data = data[part]
    return data


def remove(data: dict[str, Any], place: Place) -> None:
    """Take out what stands at `place`; an item of an array goes with its array, but for an array of tables."""
    while (isinstance(place[-1], int) and place[0] != "build") or (isinstance(place[-1], int) and len(place) > 2):
        place = place[:-1]
    parent = table_at(data, place[:-1])
    if isinstance(parent, dict):
        parent.pop(place[-1], None)
        if place[0] == "build" and place[-1] == "name":  # required: it would be missed next
            parent["name"] = f"build-{place[1]}"
    else:
        parent[place[-1]] = {"name": f"build-{place[-1]}", "shape": "1x1"}


def keys_at(place: Place) -> list[str]:
    """The keys that the table at `place` may have."""
    model: type[BaseModel] = BuildFile
    tables: dict[str, type[BaseModel]] = {"model": ModelTable, "defaults": Shared, "build": BuildEntry}
    for part in place:
        if part == "workload":
            model = WorkloadTable
        elif isinstance(part, str):
            model = tables.get(part, model)
    return sorted(model.model_fields)


def choices(names: Any) -> str:
    """The fix of a name that nothing has."""
    return f"Choose one of: {', '.join(sorted(names))}"


def sentence(text: str) -> str:
    """A message inside a list: no capital, no full stop, on one line."""
    text = " ".join(text.split()).rstrip(".")
    return text[0].lower() + text[1:]
