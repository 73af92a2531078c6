"""Whether the file that a budget gets is the best there is: its loss beside a measured grid of shapes and precisions.

    python -m benchmarks.choice --data DIR --work DIR [--strategy F] [--model demo] [--target cpu] [--budgets 75 50 ...]
        [--shape S ...]

Every point of the grid is an artifact: a shape, refitted with `fast`, in every precision of the target, and the whole
model in each. A budget is a share of the decode latency of the full model in fp32; `amoeba export --latency` chooses,
as a user would have it choose. All artifacts are measured in one interleaved run, and their losses are taken from two
texts that nothing was fitted on (`--data` holds dolly.jsonl and wikitext2/valid.txt). Reported for each budget: what
was chosen, what share of the budget it uses then, its losses, and the best point of the grid that is within the budget.
What is in `--work` is not made again.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from amoeba_export import ExportRequest
from amoeba_export.api import export
from amoeba_export.artifact import read_manifest
from amoeba_export.backends.targets import read_target
from amoeba_export.cli.console import Talk
from amoeba_export.errors import BudgetError
from amoeba_export.ir import Shape
from amoeba_export.load import load_supernet
from benchmarks.budgets import beside_full
from benchmarks.refit import losses, texts

SHAPES = ("29x0.875", "27x1", "27x0.875", "26x0.75", "24x0.875", "23x0.75", "22x0.625", "20x0.75", "18x1", "16x0.625")
"""Ten: with the whole model, in four precisions, 44 points."""

WHOLE = "fp32"
"""What budgets are shares of."""


@dataclass(frozen=True, kw_only=True)
class Point:
    """One artifact.

    Attributes:
        name: What it was made for: a shape and a precision, or a budget.
        made: What it has: the same, as its manifest says.
        folder: Where it is.
        losses: Text -> nats a token.
    """

    name: str
    made: str
    folder: str
    losses: Mapping[str, float]

    @property
    def loss(self) -> float:
        """Mean over the texts."""
        return fmean(self.losses.values())


def made(options: argparse.Namespace, name: str, files: Mapping[str, Path], request: ExportRequest) -> Point | None:
    """One point, from the folder of work or made now; None where there is no such artifact."""
    record = Path(options.work) / f"{name.replace(' ', '-').replace('%', '')}.json"
    if not record.is_file():
        out = record.with_suffix("")
        try:
            export(dataclasses.replace(request, out=out, force=True), progress=Talk())
        except BudgetError as error:
            print(f"{name}: {error.what}", flush=True)
            record.write_text("null")
            return None
        manifest = read_manifest(out)
        point = Point(
            name=name,
            made=f"{Shape(manifest.shape.depth, manifest.shape.width)} {manifest.dtype}",
            folder=str(out),
            losses=losses(str(out), dict(files), options.windows),
        )
        record.write_text(json.dumps(dataclasses.asdict(point)))
    found = json.loads(record.read_text())
    return None if found is None else Point(**found)


def grid(options: argparse.Namespace, files: Mapping[str, Path]) -> Iterator[Point]:
    """Every shape in every precision, the whole model first."""
    target = read_target(options.target)
    whole = str(load_supernet(options.model).full_plan().shape)
    for shape in (whole, *options.shape):
        for dtype in (*([WHOLE] if shape == whole and WHOLE not in target.dtypes else []), *target.dtypes):
            asked = ExportRequest(
                model=options.model,
                strategy=options.strategy,
                shape=shape,
                dtype=dtype,
                formats=target.formats[:1],
                refit=None if shape == whole else "fast",
                heal="off",
            )
            if (point := made(options, f"{shape} {dtype}", files, asked)) is not None:
                yield point


def chosen(options: argparse.Namespace, files: Mapping[str, Path]) -> dict[float, Point | None]:
    """What a budget gets, by its share."""
    found = {}
    for percent in options.budgets:
        asked = ExportRequest(
            model=options.model,
            strategy=options.strategy,
            target=options.target,
            latency=f"{percent:g}%",
            formats=read_target(options.target).formats[:1],
        )
        found[percent] = made(options, f"{percent:g}%", files, asked)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--strategy", type=Path)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--target", default="cpu")
    parser.add_argument("--budgets", type=float, nargs="+", default=[75, 50, 35, 25, 15])
    parser.add_argument("--shape", nargs="*", default=list(SHAPES))
    parser.add_argument("--windows", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    files = texts(options.data, options.work)
    by_budget = chosen(options, files)
    points = list(grid(options, files))
    print_table(options, list(files), points, by_budget)


def print_table(
    options: argparse.Namespace, names: Sequence[str], points: Sequence[Point], by_budget: Mapping[float, Point | None]
) -> None:
    """Measure all that there is, and print the grid and the budgets."""
    built = [*points, *(point for point in by_budget.values() if point is not None)]
    full_ms, times_ms = beside_full(
        options.model, options.target, WHOLE, [Path(one.folder) for one in built], options.rounds
    )
    share = {point.name: ms / full_ms for point, ms in zip(built, times_ms, strict=True)}
    heads = " | ".join(names)
    print(f"\nThe full model in {WHOLE}: {full_ms:.2f} ms a token.\n\n| | share | {heads} |")
    print(f"|---|---|{'---|' * len(names)}")
    for point in sorted(points, key=lambda one: share[one.name]):
        print(f"| {point.name} | {share[point.name]:.3f} | {' | '.join(f'{point.losses[n]:.3f}' for n in names)} |")
    print(f"\n| budget | chosen | uses | {heads} | best of {len(points)} | {heads} | ahead by |")
    print(f"|---|---|---|{'---|' * len(names)}---|{'---|' * len(names)}---|")
    for percent, point in by_budget.items():
        fitting = [one for one in points if 100 * share[one.name] <= percent]
        best = min(fitting, key=lambda one: one.loss, default=None)
        if point is None:
            print(f"| {percent:g} % | none | | {' | ' * len(names)}{best.name if best else 'none'} |")
            continue
        uses = 100 * share[point.name] / percent
        cells = [point.made, f"{uses:.3f}", *(f"{point.losses[n]:.3f}" for n in names)]
        if best is not None:
            cells += [
                best.name,
                *(f"{best.losses[n]:.3f}" for n in names),
                f"{100 * (best.loss / point.loss - 1):+.1f} %",
            ]
        else:
            cells += ["none", *("" for _ in names), ""]
        print(f"| {percent:g} % | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
