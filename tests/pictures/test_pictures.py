"""Pictures say what the data says. Names that bite are escaped; nothing outside of the file is asked for."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

from amoeba_export.errors import BadValue
from amoeba_export.ir import Workload
from amoeba_export.ir.frontier import Frontier, FrontierLimit, FrontierPoint, numbered
from amoeba_export.pictures import (
    Ratio,
    SizedPoint,
    check_frontier_file,
    check_picture,
    draw_ratios,
    draw_sizes,
    frontier_page,
    write_frontiers,
)
from amoeba_export.pictures.axes import linear_axis, ratio_axis
from amoeba_export.pictures.frontier import frontier_picture, label_place

HOSTILE = '<script>alert("a|b")</script>'


def point(dtype: str, shape: str, latency_ms: float, quality: float, **more: object) -> FrontierPoint:
    return FrontierPoint(dtype=dtype, shape=shape, latency_ms=latency_ms, quality=quality, **more)  # type: ignore[arg-type]


def frontier(*, metric: str = "loss", model: str = "demo") -> Frontier:
    points = [
        point("fp32", "4x1", 10.0, 3.0, is_whole=True, latency_source="measured", fits=False),
        point("fp32", "3x1", 8.0, 3.6, latency_error=0.05),
        point("int8", "4x1", 5.0, 3.1, is_whole=True, latency_source="measured", chosen=True),
        point("int8", "3x1", 4.0, 3.7, latency_error=0.05, quality_error=0.1),
        point("int8", "2x1", 2.5, 6.0, latency_error=0.05),
    ]
    return Frontier(
        model=model,
        target="cpu",
        metric="decode",
        percentile=50,
        workload=Workload(),
        quality_metric=metric,
        higher_is_better=False,
        reference_dtype="fp32",
        limits=(FrontierLimit(label="60%, 6 ms", latency_ms=6.0), FrontierLimit(label="loss 3.5", quality=3.5)),
        points=numbered(points, mode="min"),
    )


class Page(HTMLParser):
    """Elements, attributes and text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_data(self, data: str) -> None:
        self.text += data


def test_a_mark_is_where_its_figures_are() -> None:
    picture = frontier_picture(frontier())
    at = {mark.title.split(",")[0]: mark for mark in picture.marks}
    whole, cut = at["4: full model in fp32"], at["2: 3x1 in int8"]
    assert whole.x > cut.x, "slower is to the right"
    assert whole.y > cut.y, "better is lower where a loss is drawn"
    assert (whole.label, whole.whole, whole.number) == ("fp32", True, 4)
    assert cut.latency is not None
    assert cut.latency[0] < cut.x < cut.latency[1]
    assert cut.quality is not None
    assert cut.quality[0] > cut.y > cut.quality[1]
    dominated = at["3x1 in fp32"]
    assert (dominated.colour, dominated.number) == (None, None)
    latency, quality = picture.limits
    assert latency.x is not None
    assert at["3: full model in int8"].x < latency.x < whole.x
    assert quality.y is not None
    assert cut.y < quality.y < at["3: full model in int8"].y


def test_every_mark_lies_inside_the_axes() -> None:
    for metric in ("loss", "perplexity"):
        picture = frontier_picture(frontier(metric=metric), width=300, height=200)
        for mark in picture.marks:
            assert picture.left < mark.x < picture.width - picture.right
            assert picture.top < mark.y < picture.height - picture.bottom


@pytest.mark.parametrize("ms", [(7.0, 8.3, 9.9), (7.0, 7.0, 7.0)], ids=["near", "equal"])
def test_labels_of_near_full_models_do_not_meet(ms: tuple[float, float, float]) -> None:
    dtypes = ("int4", "int4-mixed", "int8")
    wholes = [point(dtype, "4x1", each, 3.7, is_whole=True) for dtype, each in zip(dtypes, ms, strict=True)]
    drawn = replace(frontier(), points=numbered(wholes, mode="min"))
    assert {one.dtype: label_place(drawn, one) for one in drawn.wholes} == {
        "int4": "above",
        "int4-mixed": "below",
        "int8": "right",
    }


def test_the_page_says_every_figure_and_needs_nothing_else() -> None:
    text = frontier_page([frontier()])
    page = Page(text)
    for said in ("10.00 ms", "5.000 ms", "3.7 ± 0.1", "2.500 ms ± 5 %", "60%, 6 ms", "loss 3.5", "fp32", "int8"):
        assert said in page.text, said
    assert "script" not in page.elements
    assert not [value for name, value in page.attributes if name in ("src", "href") and value != "data:,"]
    assert not re.search(r"https?://|url\(", text)
    assert "prefers-color-scheme: dark" in text
    assert 'name="viewport"' in text
    titles = [value for name, value in page.attributes if name == "aria-label"]
    assert titles
    assert all("demo on cpu" in title for title in titles)


def test_names_are_text() -> None:
    page = Page(frontier_page([frontier(model=HOSTILE + "\x07")]))
    assert "script" not in page.elements
    assert HOSTILE in page.text
    assert "\x07" not in page.text


def test_the_file_is_what_its_name_says(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    heads = {"png": b"\x89PNG", "svg": b"<?xml", "pdf": b"%PDF", "html": b"<!doctype html>", "json": b"{"}
    for suffix, head in heads.items():
        path = tmp_path / f"a.{suffix}"
        write_frontiers([frontier()], path)
        first = path.read_bytes()
        assert first.startswith(head)
        write_frontiers([frontier()], path)
        assert path.read_bytes() == first, suffix
    assert Frontier.from_json(json.loads((tmp_path / "a.json").read_text()), where="a") == frontier()


def test_another_name_is_refused_before_the_work(tmp_path: Path) -> None:
    with pytest.raises(BadValue):
        check_frontier_file(tmp_path / "a.gif")
    with pytest.raises(BadValue):
        check_picture(tmp_path / "a.html")


def test_ratios_and_sizes_are_pictures_too(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    draw_ratios(
        [Ratio(name="a", ratio=1.0), Ratio(name="b", ratio=1.1, low=1.0, high=1.2)], tmp_path / "r.png", what="decode"
    )
    sizes = [SizedPoint(name=str(n), millions=n, quality=9 - n, on_front=n > 1) for n in (1, 2, 3)]
    draw_sizes(sizes, tmp_path / "s.png", metric="perplexity")
    for name in ("r.png", "s.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(("low", "high"), [(0.001, 0.0011), (2.1, 2.1), (1.4, 17), (3, 4000)])
def test_axes_have_a_few_round_ticks(low: float, high: float) -> None:
    for axis in (linear_axis, ratio_axis):
        ticks, scale = axis([low, high], 0, 100)
        assert 1 <= len(ticks) <= 16
        assert len({tick.label for tick in ticks}) == len(ticks)
        assert 0 < scale(low) <= scale(high) < 100
        for tick in ticks:
            assert scale(float(tick.label)) == pytest.approx(tick.at, abs=0.5)
