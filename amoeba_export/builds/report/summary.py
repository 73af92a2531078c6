"""Markdown for the page of a CI job."""

from __future__ import annotations

from amoeba_export.builds.outcome import BuildReport
from amoeba_export.builds.report.templates import render


def markdown_summary(report: BuildReport) -> str:
    """A table of the entries, and below it every failure with its next step."""
    return render("summary.md.j2", report=report).rstrip() + "\n"
