"""What came of a build: a page, a summary for the CI job, JUnit XML for its test view, JSON for programs."""

from __future__ import annotations

from pathlib import Path

from amoeba_export.builds.outcome import REPORT_NAME, BuildReport
from amoeba_export.builds.report.junit import junit_xml
from amoeba_export.builds.report.page import html_page
from amoeba_export.builds.report.summary import markdown_summary

JUNIT_NAME = "junit.xml"
SUMMARY_NAME = "summary.md"
PAGE_NAME = "report.html"


def write_reports(report: BuildReport, folder: Path) -> list[Path]:
    """Write every view of `report` into `folder`, which exists, and return the files. Each is replaced at once."""
    made = []
    for name, text in (
        (REPORT_NAME, report.to_text()),
        (JUNIT_NAME, junit_xml(report)),
        (SUMMARY_NAME, markdown_summary(report)),
        (PAGE_NAME, html_page(report)),
    ):
        path = folder / name
        part = folder / f".{name}.part"
        part.write_text(text, encoding="utf-8")
        part.replace(path)
        made.append(path)
    return made
