"""Every view of a build says what its JSON says. The reports here are made from dataclasses, with names that bite."""

from __future__ import annotations

import dataclasses
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest

from amoeba_export.artifact import FileEntry, FullModelRecord
from amoeba_export.builds.outcome import (
    BuildReport,
    EntryOutcome,
    ErrorRecord,
    LatencyFigures,
    QualityFigures,
    read_report,
)
from amoeba_export.builds.plan_record import LayerRecord, PlanRecord
from amoeba_export.builds.report import write_reports
from amoeba_export.ir import InputId, Workload
from amoeba_export.ir.frontier import Frontier, FrontierLimit, FrontierPoint, numbered

HOSTILE = '<script>alert("a|b")</script>'


def layer(source: int, heads: int, ffn: int) -> LayerRecord:
    return LayerRecord(source_layer=source, query_heads=tuple(range(heads)), kv_heads=(0,), ffn=ffn)


def plan(shape: str, *layers: LayerRecord) -> PlanRecord:
    return PlanRecord(
        shape=shape, policy="uniform", layers=layers, num_layers=4, num_heads=6, num_kv_heads=3, ffn_size=96
    )


def point(shape: str, latency_ms: float, quality: float, *, chosen: bool = False) -> FrontierPoint:
    return FrontierPoint(
        dtype="fp32",
        shape=shape,
        is_whole=shape == "4x1",
        latency_ms=latency_ms,
        quality=quality,
        fits=latency_ms < 10,
        chosen=chosen,
    )


def frontier(target: str, *points: FrontierPoint) -> Frontier:
    return Frontier(
        model="demo",
        target=target,
        metric="decode",
        percentile=50,
        workload=Workload(),
        quality_metric="loss",
        higher_is_better=False,
        reference_dtype="fp32",
        limits=(FrontierLimit(label="80%, 10.1 ms", latency_ms=10.1),),
        points=numbered(points, mode="min"),
    )


MEASURED = EntryOutcome(
    name=HOSTILE,
    status="built",
    target="cpu",
    dtype="fp32",
    out="dist/a",
    seconds=12.5,
    latency=LatencyFigures(
        metric="decode",
        percentile=50,
        budget="80%",
        limit_ms=10.123456,
        predicted_ms=9.5,
        uncertainty=0.1,
        measured_ms={"p50": 9.87654, "p90": 11.0},
        full_ms=12.6,
    ),
    quality=QualityFigures(metric="loss", value=3.14159, full=2.9),
    plan=plan("2x0.5", layer(0, 3, 48), layer(3, 3, 48)),
    reference=(
        FullModelRecord(
            dtype="fp32", latency_ms=12.65432, source="measured", quality={"loss": 2.9}, keeps_budget=False
        ),
        FullModelRecord(dtype="int8", latency_ms=6.5, source="measured", quality={"loss": 2.95}, keeps_budget=True),
    ),
    frontier=frontier("cpu", point("4x1", 12.6, 2.9), point("2x0.5", 9.5, 3.14159, chosen=True)),
    inputs=(InputId(role="model", id=HOSTILE, sha256="ab" * 32),),
    files=(FileEntry(path="onnx/model.onnx", size_bytes=1234567, sha256="cd" * 32),),
)
ESTIMATE = EntryOutcome(
    name="jetson",
    status="built",
    target="jetson",
    seconds=1.0,
    latency=LatencyFigures(metric="decode", percentile=50, limit_ms=50.0, predicted_ms=15.4179, source="recorded"),
    plan=plan("1x1", layer(2, 6, 96)),
)
PLAIN = EntryOutcome(name="no-target", status="up-to-date", plan=plan("1x1", layer(0, 6, 96)))
BROKEN = EntryOutcome(
    name="broken",
    status="failed",
    error=ErrorRecord(
        kind="BudgetMissed", message="Too | slow.\x07", where="amoeba.toml", next_step="Allow <more>.", exit_code=4
    ),
)
BUG = EntryOutcome(name="bug", status="failed", error=ErrorRecord(kind="KeyError", message="A bug.", exit_code=1))
LATER = EntryOutcome(name="later", status="skipped")


def report(*entries: EntryOutcome) -> BuildReport:
    return BuildReport(
        config="amoeba.toml",
        started="2026-01-01T00:00:00+00:00",
        seconds=99.5,
        engine="local",
        locked=False,
        tool={"amoeba": "0.1.0"},
        entries=entries,
    )


ALL = report(MEASURED, ESTIMATE, PLAIN, BROKEN, BUG, LATER)


class Page(HTMLParser):
    """Cells of the first table by column, every title and attribute, and every element's name."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.rows: list[dict[str, str]] = []
        self.exact: list[dict[str, str]] = []
        self.attributes: list[tuple[str, str]] = []
        self.elements: list[str] = []
        self.text = ""
        self._cell: str | None = None
        self._tables = 0
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {name: value or "" for name, value in attrs}
        self.elements.append(tag)
        self.attributes += values.items()
        self._tables += tag == "table"
        if self._tables == 1 and tag == "tr":
            self.rows.append({})
            self.exact.append({})
        if self._tables == 1 and tag == "td":
            self._cell = values["data-name"]
            self.rows[-1][self._cell] = ""
            if "title" in values:
                self.exact[-1][self._cell] = values["title"]

    def handle_endtag(self, tag: str) -> None:
        if tag == "td":
            self._cell = None

    def handle_data(self, data: str) -> None:
        self.text += data
        if self._cell is not None and self._tables == 1:
            self.rows[-1][self._cell] += data


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_reports(ALL, tmp_path)
    return tmp_path


def test_the_json_reads_back_and_nothing_else_is_left(folder: Path) -> None:
    assert read_report(folder) == ALL
    assert sorted(path.name for path in folder.iterdir()) == [
        "build-report.json",
        "junit.xml",
        "report.html",
        "summary.md",
    ]


def test_the_figures_of_the_page_are_those_of_the_json(folder: Path) -> None:
    page = Page((folder / "report.html").read_text())
    entries = json.loads((folder / "build-report.json").read_text())["entries"]
    rows, exact = page.rows[1:], page.exact[1:]
    assert [row["build"] for row in rows] == [entry["name"] for entry in entries]
    for row, full, entry in zip(rows, exact, entries, strict=True):
        latency, quality, files = entry["latency"], entry["quality"], entry["files"]
        assert row["status"] == entry["status"]
        assert row["shape"] == (entry["plan"]["shape"] if entry["plan"] else "-")
        if latency is None:
            assert (row["limit"], row["reached"], row["used"]) == ("-", "-", "-")
            continue
        actual = latency["measured_ms"]["p50"] if latency["measured_ms"] else latency["predicted_ms"]
        assert (float(full["limit"]), float(full["reached"])) == (latency["limit_ms"], actual)
        assert float(row["limit"].removesuffix(" ms")) == pytest.approx(latency["limit_ms"], rel=5e-4)
        assert float(row["reached"].split()[0]) == pytest.approx(actual, rel=5e-4)
        assert row["reached"].endswith("(estimate)") == (latency["measured_ms"] is None)
        assert row["used"] == f"{100 * actual / latency['limit_ms']:.0f} %"
        if quality:
            assert float(full["quality"]) == quality["value"]
        if files:
            assert int(full["size"]) == sum(file["size_bytes"] for file in files)


def test_the_page_says_what_the_full_model_would_give(folder: Path) -> None:
    text = Page((folder / "report.html").read_text()).text
    assert "The full model, for comparison" in text
    for said in ("12.65 ms", "6.5 ms", "loss 2.95", "kept", "missed"):
        assert said in text, said
    summary = (folder / "summary.md").read_text()
    assert "in int8 6.5 ms, loss 2.95, keeps the budget" in summary


def test_entries_of_one_target_share_a_picture(tmp_path: Path) -> None:
    second = dataclasses.replace(
        MEASURED, name="second", frontier=frontier("cpu", point("3x1", 11.0, 3.0, chosen=True), point("4x1", 12.6, 2.9))
    )
    third = dataclasses.replace(MEASURED, name="third", frontier=frontier("jetson", point("4x1", 1.0, 2.9)))
    write_reports(report(MEASURED, second, third), tmp_path)
    text = (tmp_path / "report.html").read_text()
    labels = [value for name, value in Page(text).attributes if name == "aria-label" and " against " in value]
    assert [label.rpartition(": ")[2] for label in labels] == ["demo on cpu", "demo on jetson"]
    assert "second: 80%, 10.1 ms" in text


def test_the_page_stands_alone(folder: Path) -> None:
    text = (folder / "report.html").read_text()
    page = Page(text)
    assert "script" not in page.elements
    for name, value in page.attributes:
        if name in ("src", "href"):
            assert value.startswith("data:")
    assert not re.search(r"url\(|@import|https?://", text)


def test_names_are_text_wherever_they_stand(folder: Path) -> None:
    page = Page((folder / "report.html").read_text())
    assert page.rows[1]["build"] == HOSTILE
    assert f"model: {HOSTILE}" in page.text
    assert "next: Allow <more>." in page.text


def test_junit_counts_failures_and_bugs_apart(folder: Path) -> None:
    suites = ElementTree.parse(folder / "junit.xml").getroot()
    (suite,) = suites
    assert (suites.tag, suite.tag) == ("testsuites", "testsuite")
    counts = {name: suite.get(name) for name in ("tests", "failures", "errors", "skipped", "time")}
    assert counts == {"tests": "6", "failures": "1", "errors": "1", "skipped": "1", "time": "99.500"}
    cases = {case.get("name"): case for case in suite}
    assert list(cases) == [entry.name for entry in ALL.entries]
    assert cases[HOSTILE].findtext("system-out") == "2x0.5: 9.877 ms, limit 10.12 ms"
    failure = cases["broken"].find("failure")
    assert failure is not None
    assert (failure.get("type"), failure.get("message")) == ("BudgetMissed", "Too | slow.\\x07")
    assert failure.text == "Too | slow.\\x07\nwhere: amoeba.toml\nAllow <more>."
    assert cases["bug"].find("error") is not None
    assert cases["later"].find("skipped") is not None


def test_every_row_of_the_summary_has_as_many_cells_as_its_head(folder: Path) -> None:
    text = (folder / "summary.md").read_text()
    assert text.startswith("## amoeba build: 2 built, 1 up-to-date, 2 failed, 1 skipped\n")
    table = [line for line in text.splitlines() if line.startswith("|")]
    assert len(table) == 2 + len(ALL.entries)
    assert {len(re.findall(r"(?<!\\)\|", line)) for line in table} == {10}
    assert "\n- **broken** (BudgetMissed, exit 4): Too \\| slow." in text


def test_a_build_without_searches_and_budgets_has_no_empty_plots(tmp_path: Path) -> None:
    write_reports(report(PLAIN), tmp_path)
    text = (tmp_path / "report.html").read_text()
    assert "Latency and quality" not in text
    assert "Predicted against measured" not in text
    assert "What each plan keeps" in text


def test_a_build_that_failed_as_a_whole(tmp_path: Path) -> None:
    write_reports(report(BROKEN), tmp_path)
    assert "amoeba build: 1 failed" in Page((tmp_path / "report.html").read_text()).text
