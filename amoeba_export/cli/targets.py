"""`amoeba targets`: the devices that amoeba knows, what is known of them, and whether they can be measured here.

Commands are long on purpose: each parameter is a flag, with its help.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from amoeba_export.cli.artifacts import command
from amoeba_export.cli.completion import complete_targets
from amoeba_export.cli.console import answer, facts, print_json, table, titled
from amoeba_export.cli.options import AsJson
from amoeba_export.errors import TargetUnavailable
from amoeba_export.ir import Target

if TYPE_CHECKING:
    from amoeba_export.backends.new_target import Question

targets = typer.Typer(name="targets", help="List, show, check or write targets, the devices to cut for.")

Name = Annotated[
    str,
    typer.Argument(metavar="NAME|FILE", help="Name of a target, or its TOML file.", autocompletion=complete_targets),
]


@targets.callback(invoke_without_command=True)
def default(context: typer.Context) -> None:
    """List, show, check or write targets, the devices to cut for."""
    if context.invoked_subcommand is None:
        list_()


@targets.command("list")
def list_(as_json: AsJson = False) -> None:
    """List the built-in targets."""
    from amoeba_export.backends.targets import list_targets

    found = list_targets()
    if as_json:
        print_json([_to_json(target) for target in found.values()])
        return
    shown = table("target", "recommended for", "backend", "dtype", "formats", "what it is")
    for target in found.values():
        aliases, dtypes, formats = map(", ".join, (target.aliases, target.dtypes, target.formats))
        shown.add_row(target.name, aliases, target.backend, dtypes, formats, target.description)
    answer().print(shown)


@targets.command()
def show(name: Name, as_json: AsJson = False) -> None:
    """Show one target, and where its figures come from."""
    from amoeba_export.backends.targets import read_target

    target = read_target(name)
    if as_json:
        print_json(_to_json(target))
        return
    console = answer()
    console.print(titled(f"{target.name}: {target.description}", facts(_data_sheet(target))))


def _data_sheet(target: Target) -> dict[str, str]:
    """What a reader asks of a target, in that order: what it is, what it takes, how fast it is, who says so."""
    from amoeba_export.backends import analytic, find_backend
    from amoeba_export.backends.targets import parse_options

    rows = {
        "flow": target.flow or target.backend,
        "power mode": target.power_mode or "not set",
        "names": ", ".join((target.name, *target.aliases)),
        "formats": ", ".join(target.formats),
        "precisions": f"{', '.join(target.dtypes)} (a search chooses among them)",
        "budgets limit": f"{target.metric} (or what --metric says)",
        "FFN sizes": f"multiples of {target.align}" if target.align > 1 else "any",
        "memory limit": "unknown" if target.memory_limit_mb is None else f"{target.memory_limit_mb:g} MiB",
        "limits": "; ".join(target.limits.in_words()) or "none known",
        "latencies": {"measured": "measured here", "analytic": "estimated: no device is asked"}.get(
            find_backend(target.backend).source, "recorded"
        ),
    }
    options = parse_options(target)
    if isinstance(options, analytic.Options):
        rows |= options.in_words()
    else:
        rows |= {name: value if isinstance(value, str) else json.dumps(value) for name, value in target.options.items()}
    if target.on_device:
        rows["on the device"] = f"'amoeba profile --host USER@BOARD' measures with {target.on_device['backend']}"
    return rows | {f"source {number}": source for number, source in enumerate(target.sources, 1)}


@targets.command()
def check(name: Name, as_json: AsJson = False) -> None:
    """Check whether a target can be measured here, and show what is missing. Exit code 6 if it cannot."""
    from amoeba_export.backends import find_backend
    from amoeba_export.backends.targets import read_target

    target = read_target(name)
    backend = find_backend(target.backend)
    found = backend.check(target)
    device = dict(backend.describe(target)) if found.ok else {}
    if as_json:
        print_json(
            {
                "target": target.name,
                "backend": target.backend,
                "ok": found.ok,
                "source": backend.source,
                "reason": found.reason,
                "next_step": found.next_step,
                "device": device,
            }
        )
    if not found.ok:
        raise TargetUnavailable(f"Target '{target.name}' cannot be used: {found.reason}", found.next_step)
    if not as_json:
        says = "can be measured here" if backend.source == "measured" else f"can be estimated ({backend.source})"
        answer().print(titled(f"{target.name} {says}.", facts(device)))


@targets.command()
def fit(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="The target file to write, ending in .toml.")],
    points: Annotated[
        Path,
        typer.Option("--points", metavar="CSV", help="Your measured speeds, with the columns of targets/points.csv."),
    ],
    like: Annotated[
        str | None,
        typer.Option(
            "--like",
            metavar="NAME|FILE",
            help="Target to copy formats, limits and memory from. Default: <device>-<flow> of the points.",
            autocompletion=complete_targets,
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Fit a target to your own measurements, and write its file."""
    from amoeba_export.backends.points import read_points
    from amoeba_export.backends.target_file import fit_target, write_target

    found = fit_target(read_points(points), name=file.stem, like=like)
    write_target(found.target, file)
    if as_json:
        rows = [
            {
                "model": point.model,
                "weights": point.weights,
                "metric": point.kind,
                "measured_ms": point.milliseconds,
                "fitted_ms": fitted_ms,
                "left_out_error": error,
            }
            for point, fitted_ms, error in found.rows
        ]
        print_json({"file": str(file), "target": _to_json(found.target), "points": rows})
        return
    shown = table("model", "weights", "metric", "measured", "fitted", "left out")
    for point, fitted_ms, error in found.rows:
        left_out = "-" if error is None else f"{100 * error:+.1f} %"
        times = f"{point.milliseconds:.4g} ms", f"{fitted_ms:.4g} ms"
        shown.add_row(point.model, point.weights, point.kind, *times, left_out)
    console = answer()
    console.print(shown)
    console.print(f"\nnext: {command('amoeba', 'targets', 'show', file)}")


@targets.command()
def new(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="The target file to write, ending in .toml.")],
    description: Annotated[
        str | None, typer.Option("--description", help="One line that describes the target.")
    ] = None,
    backend: Annotated[
        str | None, typer.Option("--backend", help="Backend that measures or estimates; docs/targets.md lists them.")
    ] = None,
    like: Annotated[
        str | None,
        typer.Option(
            "--like",
            metavar="NAME|FILE",
            help="Target to copy all other values from. Default: a built-in target with the same backend.",
            autocompletion=complete_targets,
        ),
    ] = None,
    flow: Annotated[str | None, typer.Option("--flow", help="Common name of the runtime.")] = None,
    power_mode: Annotated[
        str | None, typer.Option("--power-mode", help="Power mode that the figures hold for.")
    ] = None,
    formats: Annotated[
        list[str] | None, typer.Option("--format", help="Formats to write; the backend runs the first one. Repeatable.")
    ] = None,
    dtype: Annotated[
        list[str] | None, typer.Option("--dtype", help="Precisions that it runs, the preferred one first. Repeatable.")
    ] = None,
    metric: Annotated[str | None, typer.Option("--metric", help="The latency that a budget limits.")] = None,
    memory: Annotated[float | None, typer.Option("--memory", metavar="MIB", help="Memory limit of a model.")] = None,
    align: Annotated[int | None, typer.Option("--align", help="FFN sizes are multiples of this.")] = None,
    option: Annotated[
        list[str] | None, typer.Option("--option", metavar="KEY=VALUE", help="Option of the backend. Repeatable.")
    ] = None,
    limit: Annotated[
        list[str] | None, typer.Option("--limit", metavar="KEY=VALUE", help="Limit of the runtime. Repeatable.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Write a commented target file. Asks for the values that no option gives.

    If stdin is not a terminal, it asks nothing.
    """
    from amoeba_export.backends.new_target import new_target, read_pairs

    given = {
        "description": description,
        "backend": backend,
        "flow": flow,
        "power_mode": power_mode,
        "formats": formats or None,
        "dtype": dtype or None,
        "metric": metric,
        "memory_limit_mb": memory,
        "align": align,
        **read_pairs(option or [], "options", "--option"),
        **read_pairs(limit or [], "limits", "--limit"),
    }
    ask = _ask if sys.stdin.isatty() and not as_json else _unasked
    answered = {key: value for key, value in given.items() if value is not None}
    target = new_target(answered, ask, path=file, like=like)
    if as_json:
        print_json({"file": str(file), "target": _to_json(target)})
        return
    answer().print(f"{file}\n\nnext: {command('amoeba', 'targets', 'check', file)}")


def _ask(question: Question) -> str:
    """On stderr, so that stdout has the answer of the command alone."""
    choices = f" ({', '.join(question.choices)})" if question.choices else ""
    return str(typer.prompt(f"{question.words}{choices}", default=question.default, err=True))


def _unasked(question: Question) -> str:
    return ""


def _to_json(target: Target) -> dict[str, object]:
    return dataclasses.asdict(target)
