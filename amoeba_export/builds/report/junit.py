"""JUnit XML: one test case per entry, as the test views of CI systems read it."""

from __future__ import annotations

from xml.etree import ElementTree

from amoeba_export.builds.outcome import BuildReport, EntryOutcome
from amoeba_export.builds.report.wording import milliseconds, reached
from amoeba_export.shown import for_terminal


def junit_xml(report: BuildReport) -> str:
    """A suite with a case per entry. A mistake in the input is a failure, a bug of ours an error."""
    broken = [entry.error for entry in report.entries if entry.error]
    suite = ElementTree.Element(
        "testsuite",
        name="amoeba build",
        tests=str(len(report.entries)),
        failures=str(sum(error.exit_code != 1 for error in broken)),
        errors=str(sum(error.exit_code == 1 for error in broken)),
        skipped=str(sum(entry.status == "skipped" for entry in report.entries)),
        time=f"{report.seconds:.3f}",
        timestamp=report.started,
    )
    for entry in report.entries:
        words = {"classname": for_terminal(entry.target or "amoeba"), "name": for_terminal(entry.name)}
        case = ElementTree.SubElement(suite, "testcase", words, time=f"{entry.seconds:.3f}")
        if error := entry.error:
            kind = "error" if error.exit_code == 1 else "failure"
            detail = ElementTree.SubElement(case, kind, type=error.kind, message=for_terminal(error.message))
            lines = [error.message, f"where: {error.where}" if error.where else "", error.next_step or ""]
            detail.text = for_terminal("\n".join(line for line in lines if line))
        elif entry.status == "skipped":
            ElementTree.SubElement(case, "skipped")
        if said := _said(entry):
            ElementTree.SubElement(case, "system-out").text = for_terminal(said)
    suites = ElementTree.Element("testsuites")
    suites.append(suite)
    ElementTree.indent(suites)
    return ElementTree.tostring(suites, encoding="unicode", xml_declaration=True) + "\n"


def _said(entry: EntryOutcome) -> str:
    if entry.latency is None or entry.plan is None:
        return ""
    return f"{entry.plan.shape}: {reached(entry)}, limit {milliseconds(entry.latency.limit_ms)}"
