"""How figures and outcomes read, the same in every view."""

from __future__ import annotations

from amoeba_export.builds.outcome import BuildReport, EntryOutcome


def milliseconds(value: float | None) -> str:
    """`12.95 ms`, or a dash."""
    return "-" if value is None else f"{value:.4g} ms"


def megabytes(size_bytes: int) -> str:
    """`420.1 MB`."""
    return f"{size_bytes / 1e6:.4g} MB"


def artifact_bytes(entry: EntryOutcome) -> int:
    """Of all files of its artifact."""
    return sum(file.size_bytes for file in entry.files)


def use(entry: EntryOutcome) -> float | None:
    """The share of its budget that it takes, or None without one."""
    latency = entry.latency
    if latency is None or not latency.limit_ms or latency.actual_ms is None:
        return None
    return latency.actual_ms / latency.limit_ms


def reached(entry: EntryOutcome) -> str:
    """What it takes on its target; an estimate is called one."""
    if entry.latency is None or entry.latency.actual_ms is None:
        return "-"
    said = milliseconds(entry.latency.actual_ms)
    return said if entry.latency.measured_ms else f"{said} (estimate)"


def verdict(report: BuildReport) -> str:
    """The outcome in one line: `3 built, 1 failed`."""
    counts = {
        status: sum(entry.status == status for entry in report.entries)
        for status in ("built", "up-to-date", "failed", "skipped")
    }
    return ", ".join(f"{count} {status}" for status, count in counts.items() if count) or "nothing to build"
