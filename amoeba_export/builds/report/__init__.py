"""What came of a build: a page, a summary for the CI job, JUnit XML for its test view, JSON for programs."""

from __future__ import annotations

from pathlib import Path

from amoeba_export.builds.outcome import REPORT_NAME, BuildReport
from amoeba_export.builds.report.junit import junit_xml
from amoeba_export.builds.report.page import html_page
from amoeba_export.builds.report.plots import frontiers as frontiers
from amoeba_export.builds.report.summary import markdown_summary
from amoeba_export.replacing import replace_text

JUNIT_NAME = "junit.xml"
SUMMARY_NAME = "summary.md"
PAGE_NAME = "report.html"


NAMES = (REPORT_NAME, JUNIT_NAME, SUMMARY_NAME, PAGE_NAME)


def are_written(folder: Path) -> bool:
    """Whether every view is there. Those that are belong together: see `write_reports`."""
    return all((folder / name).is_file() for name in NAMES)


def write_reports(report: BuildReport, folder: Path) -> list[Path]:
    """Write every view of `report` into `folder`, which exists, and return the files.

    The old views go first: whatever stops this half-way, none is left that tells of another build than `report.json`.
    """
    texts = (report.to_text(), junit_xml(report), markdown_summary(report), html_page(report))
    for name in NAMES[1:]:
        (folder / name).unlink(missing_ok=True)
    made = []
    for name, text in zip(NAMES, texts, strict=True):
        replace_text(folder / name, text)
        made.append(folder / name)
    return made
