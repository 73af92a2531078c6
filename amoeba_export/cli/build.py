"""`amoeba build` and `amoeba init`: many artifacts from one file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from amoeba_export.cli.choices import checked_plots, write_plots
from amoeba_export.cli.completion import complete_from
from amoeba_export.cli.console import Talk, answer, duration, milliseconds, print_json, size, table
from amoeba_export.cli.options import CONFIG_NAME, AsJson, PlotFiles

if TYPE_CHECKING:
    from amoeba_export.builds.outcome import BuildReport, EntryOutcome


def build(
    config: Annotated[
        Path, typer.Argument(metavar="AMOEBA.TOML", help="The file that lists the builds.", show_default=True)
    ] = Path(CONFIG_NAME),
    locked: Annotated[
        bool,
        typer.Option(
            "--locked", help="Rebuild the artifacts of amoeba.lock, without a search. A changed input is an error."
        ),
    ] = False,
    engine: Annotated[
        str,
        typer.Option(
            "--engine",
            metavar="local|ray",
            help="Where to build: here, or on a Ray cluster whose nodes have the devices.",
            autocompletion=complete_from(("local", "ray")),
        ),
    ] = "local",
    only: Annotated[
        list[str] | None, typer.Option("--only", metavar="NAME", help="Build only this entry. Repeatable.")
    ] = None,
    jobs: Annotated[
        int, typer.Option("--jobs", metavar="N", min=1, help="Number of artifacts to verify in parallel.")
    ] = 2,
    plot: PlotFiles = None,
    as_json: AsJson = False,
) -> None:
    """Build the artifacts of amoeba.toml that are missing or out of date.

    An entry that fails does not stop the others. The exit code is that of the first failure. The output folder gets a
    report.
    """
    from amoeba_export.builds.run import BuildOptions
    from amoeba_export.builds.run import build as run

    files = checked_plots(plot)
    options = BuildOptions(locked=locked, engine=engine, only=tuple(only or ()), jobs=jobs)
    talk = Talk()
    report = run(config, options, progress=talk)
    if files:
        _plot(report, files)
    if as_json:
        print_json(report.to_json())
    else:
        _show(report)
    for entry in report.failed:
        if entry.error is not None:
            lines = [f"{entry.name}: {entry.error.message}"]
            lines += [f"  where: {entry.error.where}"] if entry.error.where else []
            lines += [f"  next:  {entry.error.next_step}"] if entry.error.next_step else []
            talk.error("\n".join(lines))
    if report.exit_code:
        raise typer.Exit(report.exit_code)


def _plot(report: BuildReport, files: Sequence[Path]) -> None:
    """What its entries were chosen from; said where nothing was searched."""
    from amoeba_export.builds.report import frontiers

    drawn = [frontier for frontier, _ in frontiers(report)]
    if drawn:
        write_plots(drawn, files)
    else:
        Talk().warn("There is nothing to plot: this build searched nothing.")


def init(
    config: Annotated[Path, typer.Argument(metavar="AMOEBA.TOML", help="The file to write.")] = Path(CONFIG_NAME),
    force: Annotated[bool, typer.Option("--force", help="Replace an existing file.")] = False,
) -> None:
    """Write a commented amoeba.toml that you can build at once."""
    from amoeba_export.artifact import check_file_destination
    from amoeba_export.builds.template import TEMPLATE
    from amoeba_export.errors import OutputExists
    from amoeba_export.replacing import replace_text

    check_file_destination(config)
    if config.exists() and not force:
        raise OutputExists(config)
    config.parent.mkdir(parents=True, exist_ok=True)
    replace_text(config, TEMPLATE)
    answer().print(f"Wrote {config}.\nnext: amoeba build{'' if config == Path(CONFIG_NAME) else f' {config}'}")


def _show(report: BuildReport) -> None:
    shown = table("build", "target", "shape", "limit", "reached", "size", "", right=("limit", "reached", "size"))
    for entry in report.entries:
        latency = entry.latency
        shown.add_row(
            entry.name,
            entry.target or "-",
            entry.plan.shape if entry.plan else "-",
            milliseconds(latency.limit_ms) if latency else "-",
            milliseconds(latency.actual_ms) if latency else "-",
            size(sum(file.size_bytes for file in entry.files)) if entry.files else "-",
            _status(entry),
            style="bold red" if entry.status == "failed" else "dim" if entry.status == "skipped" else "",
        )
    answer().print(shown)


def _status(entry: EntryOutcome) -> str:
    if entry.status == "built":
        return f"built in {duration(entry.seconds)}"
    if entry.status == "failed" and entry.error:
        return f"failed ({entry.error.exit_code})"
    return entry.status
