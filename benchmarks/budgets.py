"""Whether budgets are kept and used: random budgets, exported, then all artifacts measured again together.

    python benchmarks/budgets.py --strategy F [--model demo] [--target cpu] [--dtype fp32] [--budgets 20] [--work DIR]
        [--json FILE]

Budgets are shares of the full model between 35 % and 95 %, every other one searched in `grid` (policy uniform) and in
`layers` (policy adaptive). Afterwards all artifacts are measured in one interleaved run of `--rounds`, and the full
model before every fourth of them: all budgets are shares of its time, which must not hang on a few readings. Reported:
how many are over their budget by more than 3 % then, what share of its budget an artifact used, as it was measured when
it was built and again; and for every budget whether `layers` is worse than `grid` by the estimate of quality, from the
same cost table. Everything is in one precision (the target's preferred one), in the container that the target runs,
and without a refit, which changes no time. The strategy must reach down to 35 %: `--recipe` with many removed layers
and widths of a quarter. Budgets that a strategy cannot reach are counted apart.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from amoeba_export import ExportRequest
from amoeba_export.application import pipeline
from amoeba_export.application.resolve import read_plan
from amoeba_export.artifact import read_manifest
from amoeba_export.backends import Subject, measure_latency
from amoeba_export.backends.targets import read_target
from amoeba_export.cli.console import Talk
from amoeba_export.errors import BudgetError
from amoeba_export.ir import Latency, Workload
from amoeba_export.ir.metric import badness
from amoeba_export.load import load_supernet

POLICIES = {"grid": "uniform", "layers": "adaptive"}
TOLERANCE = 1.03


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--strategy", type=Path, required=True)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--target", default="cpu")
    parser.add_argument("--dtype", help="left out: the one that the target prefers")
    parser.add_argument("--budgets", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--work", type=Path, default=Path("build/budgets"), help="artifacts; what is there is not redone"
    )
    parser.add_argument("--export-only", type=int, metavar="N", help="make the next N artifacts and stop")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    args.dtype = args.dtype or read_target(args.target).dtype
    shares = np.round(np.random.default_rng(args.seed).uniform(35, 95, args.budgets), 1)
    missing = [i for i in range(len(shares)) if not row_file(args, i).is_file()]
    for i in missing[: args.export_only]:
        row_file(args, i).parent.mkdir(parents=True, exist_ok=True)
        row_file(args, i).write_text(json.dumps(export_one(args, i, float(shares[i]))))
    if args.export_only:
        return
    rows = [json.loads(row_file(args, i).read_text()) for i in range(len(shares))]
    again(args, rows)
    figures = summary(rows)
    print(json.dumps(figures, indent=2))
    if args.json:
        args.json.write_text(json.dumps({"figures": figures, "budgets": rows}, indent=1) + "\n")


def row_file(args: argparse.Namespace, i: int) -> Path:
    return Path(args.work / f"{i:02}.json")


def export_one(args: argparse.Namespace, i: int, percent: float) -> dict[str, object]:
    """One artifact, and what is known of it."""
    space = list(POLICIES)[i % 2]
    request = ExportRequest(
        model=args.model,
        target=args.target,
        strategy=args.strategy,
        latency=f"{percent}%",
        policy=POLICIES[space],
        dtype=args.dtype,
        formats=read_target(args.target).formats[:1],
        refit="off",
        rounding="nearest",
        out=args.work / f"{i:02}-{space}-{percent}",
        force=True,
    )
    start = time.perf_counter()
    row: dict[str, object] = {"budget": percent / 100, "space": space, "worse_than_grid": layers_worse(request)}
    try:
        result = pipeline.export(request, progress=Talk())
    except BudgetError as error:
        print(f"{percent:5.1f} % {space:6}  refused: {error.what}", flush=True)
        return {**row, "refused": error.what}
    fitted = result.fitted
    assert fitted and fitted.latency and fitted.limit_ms
    use = fitted.latency.decode.p50_ms / fitted.limit_ms
    print(f"{percent:5.1f} % {space:6} {result.plan.shape}  uses {use:.3f}", flush=True)
    seconds = time.perf_counter() - start
    return {**row, "out": str(request.out), "shape": str(result.plan.shape), "use": use, "seconds": seconds}


def layers_worse(request: ExportRequest) -> bool | None:
    """Whether the `layers` space chooses something worse than the grid under the same prediction."""
    values = []
    for policy in POLICIES.values():
        asked = dataclasses.replace(request, policy=policy, out=None)
        try:
            found = pipeline.search(asked).search
        except BudgetError:
            return None
        assert found
        values.append(badness(found.best.quality.value, found.mode))
    return values[1] > values[0] + 1e-9


def again(args: argparse.Namespace, rows: list[dict[str, object]]) -> None:
    """Measure all artifacts and the full model in one interleaved run, and take the figures into `rows`."""
    made = [row for row in rows if "out" in row]
    if not made:
        sys.exit("No budget could be kept.")
    full_ms, times_ms = beside_full(
        args.model, args.target, args.dtype, [Path(str(row["out"])) for row in made], args.rounds
    )
    for row, one_ms in zip(made, times_ms, strict=True):
        row["use_again"] = one_ms / full_ms / float(str(row["budget"]))


def beside_full(
    model: str, target_name: str, dtype: str, artifacts: Sequence[Path], rounds: int
) -> tuple[float, list[float]]:
    """Decode latencies, ms a token, from one interleaved run: the full model's in `dtype`, and each artifact's."""
    target, architecture = read_target(target_name), load_supernet(model).architecture
    full = Subject(dense=architecture.uncut, dtype=dtype, label="the full model")
    subjects = []
    for i, out in enumerate(artifacts):
        subjects += [full] * (i % 4 == 0)
        manifest = read_manifest(out)
        dense = read_plan(out).dense(architecture)
        subjects.append(Subject(dense=dense, artifact=out, dtype=manifest.dtype, label=out.name))
    results = measure_latency(subjects, Workload(), target=target, progress=Talk(), rounds=rounds)
    full_ms, times_ms = [], []
    for subject, result in zip(subjects, results, strict=True):
        if not isinstance(result, Latency):
            raise result
        (full_ms if subject is full else times_ms).append(result.decode.p50_ms)
    print("the full model:", *(f"{ms:.2f}" for ms in full_ms), "ms", flush=True)
    return statistics.median(full_ms), times_ms


def summary(rows: list[dict[str, object]]) -> dict[str, object]:
    """The figures of the run."""
    figures: dict[str, object] = {
        "budgets": len(rows),
        "refused": sum("refused" in row for row in rows),
        "layers_worse_than_grid": sum(row["worse_than_grid"] is True for row in rows),
    }
    for space in POLICIES:
        made = [row for row in rows if row["space"] == space and "use" in row]
        if not made:
            continue
        uses = [float(str(row["use"])) for row in made]
        later = [float(str(row["use_again"])) for row in made]
        figures[space] = {
            "artifacts": len(made),
            "median_use": statistics.median(uses),
            "median_use_again": statistics.median(later),
            "largest_use_again": max(later),
            "over_by_3_percent_again": sum(use > TOLERANCE for use in later),
        }
    return figures


if __name__ == "__main__":
    main()
