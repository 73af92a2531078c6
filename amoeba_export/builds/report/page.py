"""One self-contained HTML page: no network, no scripts, light and dark, narrow and wide."""

from __future__ import annotations

from dataclasses import dataclass

from amoeba_export.builds.outcome import BuildReport
from amoeba_export.builds.report import plots
from amoeba_export.builds.report.templates import render


@dataclass(frozen=True, slots=True)
class BudgetRow:
    """One entry against its budget; positions are percents of the picture's width."""

    name: str
    actual: float
    predicted: float | None
    low: float
    high: float
    title: str
    measured: bool


def html_page(report: BuildReport) -> str:
    """The page. Its figures are those of the JSON, rounded to four digits; titles hold them in full."""
    rows, end = _budget_rows(report)
    return render(
        "page.html.j2",
        report=report,
        plots=plots.frontier_plots(report),
        pictures=[(entry, plots.layer_bars(entry.plan)) for entry in report.entries if entry.plan],
        budget_rows=rows,
        budget_at=100 / end,
        size=plots,
    )


def _budget_rows(report: BuildReport) -> tuple[list[BudgetRow], float]:
    """Entries with a budget and a latency, and the share of a budget at the right end of the picture."""
    found = [
        (entry.name, latency, latency.limit_ms, latency.actual_ms)
        for entry in report.entries
        if (latency := entry.latency) and latency.limit_ms and latency.actual_ms
    ]
    shares = [actual_ms / limit_ms for _, _, limit_ms, actual_ms in found]
    shares += [(latency.predicted_ms or 0) / limit_ms for _, latency, limit_ms, _ in found]
    end = plots.use_scale(shares)
    rows = []
    for name, latency, limit_ms, actual_ms in found:
        predicted = latency.predicted_ms / limit_ms if latency.predicted_ms else None
        spread = latency.uncertainty or 0.0
        low, high = (predicted * max(0.0, 1 - spread), predicted * (1 + spread)) if predicted else (0.0, 0.0)
        said = "measured" if latency.measured_ms else "estimated"
        title = f"{name}: limit {limit_ms} ms, {said} {actual_ms} ms, predicted {latency.predicted_ms} ms"
        rows.append(
            BudgetRow(
                name=name,
                actual=100 * min(actual_ms / limit_ms, end) / end,
                predicted=None if predicted is None else 100 * min(predicted, end) / end,
                low=100 * min(low, end) / end,
                high=100 * min(high, end) / end,
                title=title,
                measured=bool(latency.measured_ms),
            )
        )
    return rows, end
