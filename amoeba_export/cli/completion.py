"""What the shell offers after an option: names that are known without loading a model."""

from __future__ import annotations

from collections.abc import Callable, Iterable


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


def complete_recipes(incomplete: str) -> list[str]:
    """Shipped recipes. Files are completed by the shell."""
    from amoeba_export.locations import data_dir

    names = sorted(path.stem for path in data_dir("calibration").glob("*.toml"))
    return [name for name in names if name.startswith(incomplete)]


def complete_from(names: Iterable[str]) -> Callable[[str], list[str]]:
    """Completion out of a fixed list."""
    known = tuple(names)
    return lambda incomplete: [name for name in known if name.startswith(incomplete)]
