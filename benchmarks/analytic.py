"""How well the analytic model explains published speeds that it has not seen.

    python -m benchmarks.analytic [--points FILE] [--check FILE] [--markdown] [--json FILE] [--plot]

Reads `targets/points.csv`, fits every device and flow (`amoeba_export.backends.fitted`), and reports of each point what
the fit says and what the fit without that point says. `--check` asks the fit about other points, in the same columns,
that had no part in it. `--markdown` prints the table of `docs/targets.md`, and the figures of the target files.
`--plot` draws that page's picture into `docs/img`.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np

from amoeba_export.backends.fitted import DEVICES, fit_figures, leave_one_out, uncertainty_of, usual
from amoeba_export.backends.points import Point, by_group, read_points
from amoeba_export.locations import data_dir

Row = dict[str, object]


def rows_of(points: list[Point], checks: list[Point]) -> list[Row]:
    """One per point: published, fitted, left out; and one per point of `checks`, as left out."""
    rows: list[Row] = []
    flow_errors = _flow_errors(points)
    others = by_group(checks)
    if unknown := sorted(set(others) - set(by_group(points))):
        raise SystemExit(f"nothing is fitted to {unknown}: name devices and flows as targets/points.csv does")
    for (device, flow), group in by_group(points).items():
        known, prior = DEVICES[device], usual(device, flow)
        figures = fit_figures(group, bandwidth_gb_s=known.bandwidth_gb_s, prior=prior)
        stated = uncertainty_of(flow_errors[flow, known.is_cpu])
        left_out = leave_one_out(group, bandwidth_gb_s=known.bandwidth_gb_s, prior=prior)
        held_back = [
            (point, figures.predict_ms(point) / point.milliseconds - 1) for point in others.get((device, flow), [])
        ]
        for kept, pairs in ((True, left_out), (False, held_back)):
            for point, error in pairs:
                rows.append(
                    {
                        "device": device,
                        "flow": flow,
                        "model": point.model,
                        "weights": point.weights,
                        "metric": point.kind,
                        "published_ms": point.milliseconds,
                        "fitted_ms": figures.predict_ms(point),
                        "error": error,
                        "stated": stated,
                        "in_fit": kept,
                    }
                )
    return rows


def _flow_errors(points: list[Point]) -> dict[tuple[str, bool], list[float]]:
    """Leave-one-out errors of each flow, processors apart, over all its devices."""
    errors: dict[tuple[str, bool], list[float]] = {}
    for (device, flow), group in by_group(points).items():
        known = DEVICES[device]
        found = leave_one_out(group, bandwidth_gb_s=known.bandwidth_gb_s, prior=usual(device, flow))
        errors.setdefault((flow, known.is_cpu), []).extend(error for _, error in found)
    return errors


def summary(rows: list[Row]) -> dict[str, dict[str, float]]:
    """Median and worst error of each metric, and the share of errors that the stated uncertainty covers."""
    found = {}
    for metric in ("decode", "prefill"):
        errors = np.abs([float(str(row["error"])) for row in rows if row["metric"] == metric])
        stated = np.array([float(str(row["stated"])) for row in rows if row["metric"] == metric])
        if errors.size:
            found[metric] = {
                "points": float(errors.size),
                "median": float(np.median(errors)),
                "worst": float(errors.max()),
                "covered": float(np.mean(errors <= stated)),
            }
    return found


def markdown(rows: list[Row]) -> str:
    """The table of `docs/targets.md`."""
    lines = [
        "| device | flow | model | weights | | published | fitted | left out |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        lines.append(
            f"| {row['device']} | {row['flow']} | {row['model']} | {row['weights']} | {row['metric']} | "
            f"{row['published_ms']:.4g} ms | {row['fitted_ms']:.4g} ms | {100 * float(str(row['error'])):+.1f} % |"
        )
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--points", type=Path, default=data_dir("targets") / "points.csv")
    parser.add_argument("--check", type=Path)
    parser.add_argument("--markdown", action="store_true")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", action="store_true")
    settings = parser.parse_args()
    points = read_points(settings.points)
    rows = rows_of(points, read_points(settings.check) if settings.check else [])
    print(markdown(rows))
    if not settings.markdown:
        for (device, flow), group in by_group(points).items():
            found = fit_figures(group, bandwidth_gb_s=DEVICES[device].bandwidth_gb_s, prior=usual(device, flow))
            compute = "-" if found.compute_tflops is None else f"{found.compute_tflops:.3g} TFLOPS"
            memory = f"{found.efficiency:.3g} of {found.bandwidth_gb_s:g} GB/s"
            print(f"{device} {flow}: {found.per_layer_ms:.3g} ms a layer, {memory}, {compute}")
        for kept in (True, False):
            for metric, figures in summary([row for row in rows if row["in_fit"] is kept]).items():
                shown = {name: round(value, 4) for name, value in figures.items()}
                print("left out" if kept else "held back", metric, shown)
    if settings.plot:
        from benchmarks.analytic_plot import draw

        for path in draw(rows, Path(__file__).parent.parent / "docs" / "img"):
            print(path)
    if settings.json:
        text = json.dumps({"rows": rows, "summary": summary(rows)}, indent=1)
        settings.json.write_text(f"{text}\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
