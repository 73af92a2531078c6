"""`amoeba cache`: what was kept to be found again, and how to get rid of it."""

from __future__ import annotations

from typing import Annotated

import typer

from amoeba_export.cli.console import Talk, answer, print_json, size, table, titled
from amoeba_export.cli.options import AsJson

cache = typer.Typer(name="cache", no_args_is_help=True, help="Show or clear the cache.")


@cache.command()
def info(as_json: AsJson = False) -> None:
    """Show where the cache is and what it holds."""
    from amoeba_export.cache import Cache

    place = Cache()
    usage = place.usage()
    if as_json:
        kinds = [{"kind": one.kind, "num_entries": one.num_entries, "size_bytes": one.size_bytes} for one in usage]
        print_json({"path": str(place.root), "kinds": kinds})
        return
    shown = table("kind", "entries", "size", right=("entries", "size"))
    for one in usage:
        shown.add_row(one.kind, str(one.num_entries), size(one.size_bytes))
    shown.add_row(
        "total", str(sum(one.num_entries for one in usage)), size(sum(one.size_bytes for one in usage)), style="bold"
    )
    answer().print(titled(str(place.root), shown))


@cache.command()
def prune(
    older_than: Annotated[
        float,
        typer.Option(
            "--older-than", metavar="DAYS", min=0, help="Remove only entries that were not used for this many days."
        ),
    ] = 0,
    kind: Annotated[
        list[str] | None, typer.Option("--kind", metavar="KIND", help="Remove only this kind. Repeatable.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Remove entries of the cache. Amoeba can make all of them again."""
    from amoeba_export.cache import Cache
    from amoeba_export.errors import UnknownName

    place = Cache()
    kinds = {one.kind for one in place.usage()}
    for name in kind or ():
        if name not in kinds:
            raise UnknownName("kind of cache entry", name, kinds or {"(the cache is empty)"})
    occupied = sorted(name for name in kind or kinds if place.is_occupied(name))
    freed_bytes = place.prune(older_than_days=older_than, kinds=kind or None)
    if as_json:
        print_json({"path": str(place.root), "freed_bytes": freed_bytes, "occupied": occupied})
    else:
        answer().print(f"Freed {size(freed_bytes)} in {place.root}.")
    for name in occupied:
        Talk().warn(f"'{name}' was left alone: a running command works in it.")
