from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from amoeba_export.backends.fitted import DEVICES, Figures, Usual, fit_figures, leave_one_out, uncertainty_of, usual
from amoeba_export.backends.points import Point, by_group, read_points
from amoeba_export.backends.targets import list_targets, read_target
from amoeba_export.errors import BadRecord, InputError
from amoeba_export.formats.sizes import weight_bytes
from amoeba_export.locations import data_dir
from benchmarks import analytic_plot
from benchmarks.analytic import _flow_errors, markdown, rows_of, summary

WIDE = Usual(per_layer_ms=0.1, efficiency=0.7, efficiency_spread=100.0, noise=1e-4)
HEADER = (
    "device,power_mode,flow,weights,head,model,hidden,layers,heads,kv_heads,head_dim,ffn,vocab,tied,metric,tokens,"
    "value,source\n"
)
ROW = "board,,llamacpp,Q8_0,Q8_0,tiny,512,8,8,4,64,1024,1000,1,decode_tok_s,128,20,mine\n"


def point(*, layers: int, ffn: int, metric: str = "decode_ms", value: float = 1.0, tokens: int = 128) -> Point:
    return Point(
        device="board", flow="llamacpp", weights="Q8_0", model="m", hidden=512, layers=layers, heads=8, kv_heads=4,
        head_dim=64, ffn=ffn, vocab=32000, tied=True, metric=metric, tokens=tokens, value=value,
    )  # fmt: skip


def test_the_published_points_are_explained_within_the_bars() -> None:
    points = read_points(data_dir("targets") / "points.csv")
    found = summary(rows_of(points, []))
    assert len(points) == 42
    assert found["decode"]["points"] == 31
    assert found["decode"]["median"] <= 0.05
    assert found["decode"]["worst"] <= 0.15
    assert found["prefill"]["median"] <= 0.10
    assert found["prefill"]["worst"] <= 0.25
    assert min(metric["covered"] for metric in found.values()) >= 0.9
    assert all(one.source for one in points)


def test_the_picture_has_a_mark_for_every_flow_and_is_drawn_alike_each_time(tmp_path: Path) -> None:
    rows = rows_of(read_points(data_dir("targets") / "points.csv"), [])
    assert {row["flow"] for row in rows} == set(analytic_plot.FLOWS)
    first = {path.name: path.read_bytes() for path in analytic_plot.draw(rows, tmp_path)}
    assert sorted(first) == ["analytic-dark.png", "analytic-light.png"]
    assert {path.name: path.read_bytes() for path in analytic_plot.draw(rows, tmp_path)} == first


FLOWS = {"edgellm": "TensorRT Edge-LLM", "vllm": "vLLM", "llamacpp": "llama.cpp"}


def test_target_files_have_the_figures_of_the_fit() -> None:
    """Those with points. `jetson-orin-nano-edgellm` is the board whose memory runs at 68 GB/s, as its points are."""
    points = read_points(data_dir("targets") / "points.csv")
    errors = _flow_errors(points)
    checked = 0
    for (device, flow), group in by_group(points).items():
        name = f"{device.removesuffix('-68gbs')}-{flow}"
        if name not in list_targets():
            continue
        target, known = read_target(name), DEVICES[device]
        found = fit_figures(group, bandwidth_gb_s=known.bandwidth_gb_s, prior=usual(device, flow))
        assert target.flow == FLOWS[flow]
        assert target.options["bandwidth_gb_s"] == known.bandwidth_gb_s
        assert target.options["bandwidth_efficiency"] == pytest.approx(found.efficiency, rel=1e-3)
        assert target.options["per_layer_ms"] == pytest.approx(found.per_layer_ms, rel=1e-3)
        if found.compute_tflops:
            assert target.options["compute_tflops"] == pytest.approx(found.compute_tflops, rel=1e-2)
        assert target.options["uncertainty"] >= uncertainty_of(errors[flow, known.is_cpu]) - 1e-9
        checked += 1
    assert checked == 8


def test_figures_that_made_the_points_are_found_again() -> None:
    true = Figures(bandwidth_gb_s=100, efficiency=0.6, per_layer_ms=0.2, compute_tflops=3.0)
    points = []
    for layers, ffn in ((8, 1024), (24, 4096), (12, 8192)):
        for metric in ("decode_ms", "prefill_ms"):
            blank = point(layers=layers, ffn=ffn, metric=metric, tokens=1024)
            points.append(blank.model_copy(update={"value": true.predict_ms(blank)}))
    found = fit_figures(points, bandwidth_gb_s=100, prior=WIDE)
    assert found.efficiency == pytest.approx(0.6, rel=1e-3)
    assert found.per_layer_ms == pytest.approx(0.2, rel=1e-3)
    assert found.compute_tflops == pytest.approx(3.0, rel=1e-3)
    errors = [error for _, error in leave_one_out(points, bandwidth_gb_s=100, prior=WIDE)]
    assert len(errors) == 6
    assert np.abs(errors).max() < 0.01
    assert uncertainty_of(errors) == 0.05
    assert uncertainty_of([0.02, -0.081]) == 0.09


def test_without_points_the_usual_stands() -> None:
    prior = usual("jetson-orin-nx", "vllm")
    found = fit_figures([], bandwidth_gb_s=102.4, prior=prior)
    assert (found.per_layer_ms, found.efficiency) == pytest.approx((prior.per_layer_ms, prior.efficiency))
    assert found.compute_tflops is None
    assert usual("raspberry-pi-5", "llamacpp") != usual("jetson-orin-nano", "llamacpp")
    assert DEVICES["raspberry-pi-5"].is_cpu


def test_bytes_are_those_of_the_format() -> None:
    """Q8_0 is what our GGUF writes as int8; groups of 128 have one fp16 scale; the head has its own precision."""
    one = point(layers=8, ffn=1024)
    weights = weight_bytes(one.dense, ("gguf",), "int8")
    cache = 8 * 4 * 4 * 64 * 128
    assert one.work().memory_bytes == weights.layers + weights.head + cache
    grouped = one.model_copy(update={"weights": "int4 g128", "head": "fp16"})
    matrices = 8 * (2 * 512 * 512 + 2 * 512 * 256 + 3 * 512 * 1024)
    norms = 2 * (2 * 8 + 1) * 512
    assert grouped.work().memory_bytes == matrices * 4.125 / 8 + norms + 32000 * 512 * 2 + cache


def test_a_prefill_reads_the_cache_it_made_and_computes_whole_squares() -> None:
    one = point(layers=8, ffn=1024, metric="prefill_ms", tokens=64)
    matrices = one.dense.num_params - 32000 * 512
    assert one.work().flops == 2 * matrices * 64 + 2 * 32000 * 512 + 8 * 4 * 8 * 64 * 64 * 64


def read(path: Path, text: str) -> list[Point]:
    path.write_text(text, encoding="utf-8")
    return read_points(path)


def test_a_file_of_points_is_read_with_its_units(tmp_path: Path) -> None:
    (one,) = read(tmp_path / "p.csv", HEADER + ROW)
    assert (one.kind, one.milliseconds, one.tied, one.power_mode) == ("decode", 50.0, True, "")


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        (ROW.replace(",20,", ",0,"), "has '0' as its value: input should be greater than 0"),
        (ROW.replace("decode_tok_s", "speed"), "has 'speed' as its metric"),
        (ROW.replace("Q8_0,Q8_0", "Q3_X,"), "has the precision 'Q3_X', which is none of fp32, fp16"),
        (ROW.replace(",512,", ",,"), "has no hidden"),
        ("board,llamacpp\n", "does not have 18 fields"),
        (ROW.replace(",20,", ",nan,"), "has 'nan' as its value"),
    ],
)
def test_a_wrong_row_is_named(tmp_path: Path, row: str, problem: str) -> None:
    with pytest.raises(BadRecord) as caught:
        read(tmp_path / "p.csv", HEADER + ROW + row)
    assert problem in str(caught.value)
    assert "3" in str(caught.value)


def test_a_file_without_rows_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="has no rows"):
        read(tmp_path / "p.csv", HEADER)


def test_the_table_in_the_docs_is_the_fit() -> None:
    """`python -m benchmarks.analytic --markdown` prints it."""
    page = (Path(__file__).parents[2] / "docs" / "targets.md").read_text(encoding="utf-8")
    table = page.partition("<!-- points -->\n")[2].partition("\n<!-- end -->")[0]
    assert table == markdown(rows_of(read_points(data_dir("targets") / "points.csv"), []))
