"""`amoeba targets fit`: measurements in, a target file out."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from amoeba_export.backends import Subject, measure_latency
from amoeba_export.backends.fitted import Figures
from amoeba_export.backends.points import Point
from amoeba_export.backends.target_file import fit_target, write_target
from amoeba_export.backends.targets import list_targets, read_target
from amoeba_export.errors import InputError, UsageError
from amoeba_export.ir import Latency, Workload
from tests.conftest import Run

Amoeba = Callable[..., Run]

TRUE = Figures(bandwidth_gb_s=102, efficiency=0.7, per_layer_ms=0.09, compute_tflops=2.5)
"""A board with the memory of the Orin Nano Super, and another speed."""

SIZES = ((8, 512, 2048), (24, 1024, 4096), (16, 2048, 8192))


def point(layers: int, hidden: int, ffn: int, metric: str, **changes: str) -> Point:
    blank = Point(
        device="jetson-orin-nano", power_mode="15 W", flow="llamacpp", weights="Q8_0", model=f"m{layers}",
        hidden=hidden, layers=layers, heads=hidden // 64, kv_heads=4, head_dim=64, ffn=ffn, vocab=32000, tied=True,
        metric=metric, tokens=128, value=1.0, source="my bench",
    ).model_copy(update=changes)  # fmt: skip
    ms = TRUE.predict_ms(blank)
    return blank.model_copy(update={"value": 1000 / ms if metric == "decode_tok_s" else ms})


def points() -> list[Point]:
    return [point(*size, metric) for size in SIZES for metric in ("decode_tok_s", "prefill_ms")]


def csv_of(rows: list[Point], path: Path) -> Path:
    names = list(Point.model_fields)
    lines = [",".join(str(int(v) if isinstance(v, bool) else v) for v in row.model_dump().values()) for row in rows]
    path.write_text("\n".join([",".join(names), *lines]) + "\n")
    return path


def test_the_file_has_the_figures_that_made_the_measurements(amoeba: Amoeba, tmp_path: Path) -> None:
    file = tmp_path / "my-board.toml"
    run = amoeba("targets", "fit", file, "--points", csv_of(points(), tmp_path / "points.csv"))
    assert (run.code, run.err) == (0, "")
    target = read_target(file)
    assert target.options["bandwidth_efficiency"] == pytest.approx(0.7, rel=0.03)
    assert target.options["per_layer_ms"] == pytest.approx(0.09, rel=0.05)
    assert target.options["compute_tflops"] == pytest.approx(2.5, rel=0.01)
    assert target.options["uncertainty"] <= 0.1
    assert (target.power_mode, target.flow, target.formats[0]) == ("15 W", "llama.cpp", "gguf")
    assert target.limits == read_target("jetson").limits
    assert "Points: my bench" in target.sources
    dense = points()[2].dense
    (latency,) = measure_latency([Subject(dense=dense, dtype="int8")], Workload(prompt_tokens=128), target=target)
    assert isinstance(latency, Latency)
    assert latency.decode.p50_ms == pytest.approx(points()[2].milliseconds, rel=0.02)


def test_json_says_each_point(amoeba: Amoeba, tmp_path: Path) -> None:
    file = tmp_path / "my.toml"
    run = amoeba("targets", "fit", file, "--points", csv_of(points(), tmp_path / "points.csv"), "--json")
    answer = json.loads(run.out)
    assert answer["file"] == str(file)
    assert [row["model"] for row in answer["points"]] == ["m8", "m8", "m24", "m24", "m16", "m16"]
    for row in answer["points"]:
        assert row["fitted_ms"] == pytest.approx(row["measured_ms"], rel=0.02)


def test_few_points_keep_the_uncertainty_of_the_target_like_it() -> None:
    one = fit_target(points()[:1], name="x", like=None).target
    assert one.options["uncertainty"] >= read_target("jetson").options["uncertainty"]
    assert one.options["compute_tflops"] == read_target("jetson").options["compute_tflops"]


def test_another_board_names_the_one_it_is_like(amoeba: Amoeba, tmp_path: Path) -> None:
    rows = [row.model_copy(update={"device": "bench-9", "flow": "fork"}) for row in points()]
    path = csv_of(rows, tmp_path / "points.csv")
    refused = amoeba("targets", "fit", tmp_path / "x.toml", "--points", path)
    assert refused.code == 2
    assert "There is no target 'bench-9-fork' to take formats" in refused.err
    assert not (tmp_path / "x.toml").exists()
    assert amoeba("targets", "fit", tmp_path / "x.toml", "--points", path, "--like", "jetson").code == 0
    assert read_target(tmp_path / "x.toml").description == "bench-9, with llama.cpp"


def test_a_file_that_is_there_stays(amoeba: Amoeba, tmp_path: Path) -> None:
    file = tmp_path / "x.toml"
    file.write_text("mine")
    run = amoeba("targets", "fit", file, "--points", csv_of(points(), tmp_path / "points.csv"))
    assert run.code == 2
    assert file.read_text() == "mine"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["points.csv", "x.toml"]


def test_what_cannot_be_fitted_is_refused(tmp_path: Path) -> None:
    two = [points()[0], points()[1].model_copy(update={"flow": "vllm"})]
    with pytest.raises(
        InputError, match="2 devices and flows: jetson-orin-nano with llamacpp, jetson-orin-nano with v"
    ):
        fit_target(two, name="x", like=None)
    with pytest.raises(InputError, match="Target 'cpu' is measured, not estimated"):
        fit_target(points(), name="x", like="cpu")
    with pytest.raises(UsageError, match=r"ends in \.toml"):
        write_target(read_target("jetson"), tmp_path / "x.json")


def test_every_estimated_target_is_written_and_read_back(tmp_path: Path) -> None:
    for name, target in list_targets().items():
        write_target(target, tmp_path / f"{name}.toml")
        again = read_target(tmp_path / f"{name}.toml")
        assert {**vars_of(again), "aliases": ()} == {**vars_of(target), "aliases": ()}


def vars_of(target: object) -> dict[str, object]:
    return {name: getattr(target, name) for name in target.__dataclass_fields__}  # type: ignore[attr-defined]
