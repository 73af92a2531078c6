"""The frontier of a machine whose every latency and loss is known."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import pytest

from amoeba_export import ExportRequest, export
from amoeba_export.application import goal, pipeline, recovery
from amoeba_export.application.fit import Fitted
from amoeba_export.application.worth import quality_figures
from amoeba_export.artifact import read_manifest
from amoeba_export.errors import (
    InputError,
    NothingGoodEnough,
    NothingInMemory,
    NothingToPick,
    Problems,
    QualityTooLow,
    UsageError,
)
from amoeba_export.ir import Shape
from amoeba_export.ir.frontier import MOST_NUMBERED, Frontier, FrontierPoint, numbered
from amoeba_export.load import read_strategy, write_strategy
from tests.application.test_pipeline import FASTER, RISES, model, precisions, strategy, target
from tests.application.test_prospects import refits
from tests.listener import Listener

__all__ = ["model", "precisions", "refits", "strategy", "target"]


@pytest.fixture
def request_of(model: Path, strategy: Path, precisions: Path) -> ExportRequest:
    return ExportRequest(model=str(model), strategy=strategy, target=str(precisions))


def test_every_precision_has_its_full_model_and_its_line(request_of: ExportRequest):
    found = pipeline.frontier(request_of)
    assert found.dtypes == ("fp32", "int8", "int4")
    assert (found.quality_metric, found.higher_is_better, found.reference_dtype) == ("loss", False, "fp32")
    wholes = {point.dtype: point for point in found.wholes}
    full_ms = wholes["fp32"].latency_ms
    for dtype, factor in FASTER.items():
        assert wholes[dtype].latency_ms == pytest.approx(factor * full_ms)
        assert wholes[dtype].quality == pytest.approx(4.0 + RISES[dtype])
        assert wholes[dtype].latency_source == "measured"
        shapes = {point.shape for point in found.points if point.dtype == dtype}
        assert {"4x1", "2x0.5"} <= shapes
        smallest = next(point for point in found.points if (point.dtype, point.shape) == (dtype, "2x0.5"))
        assert smallest.quality == pytest.approx(10 - 2 - 2 * 0.5 + RISES[dtype])
        line = found.line(dtype)
        assert [one.latency_ms for one in line] == sorted(one.latency_ms for one in line)
        assert [one.quality for one in line] == sorted((one.quality for one in line), reverse=True)


def test_nothing_beats_what_is_on_the_frontier_and_the_rest_is_beaten(request_of: ExportRequest):
    found = pipeline.frontier(request_of)
    for point in found.points:
        beaten = any(
            other.latency_ms <= point.latency_ms
            and other.quality <= point.quality
            and (other.latency_ms, other.quality) != (point.latency_ms, point.quality)
            for other in found.points
        )
        assert point.on_frontier != beaten, point
    assert [point.number for point in found.numbered] == list(range(1, len(found.numbered) + 1))
    assert all(point.on_frontier for point in found.numbered)
    assert {"int8", "fp32"} <= {point.dtype for point in found.numbered if point.is_whole}


def test_a_budget_is_a_line_and_restricts_nothing(request_of: ExportRequest):
    free = pipeline.frontier(request_of)
    limited = pipeline.frontier(dataclasses.replace(request_of, latency="50%"))
    (limit,) = limited.limits
    full_ms = next(point.latency_ms for point in free.wholes if point.dtype == "fp32")
    assert limit.latency_ms == pytest.approx(0.5 * full_ms)
    assert limit.label == f"50%, {0.5 * full_ms:.4g} ms"
    assert [(p.dtype, p.shape, p.latency_ms, p.number) for p in limited.points] == [
        (p.dtype, p.shape, p.latency_ms, p.number) for p in free.points
    ]


def test_the_json_reads_back(request_of: ExportRequest):
    found = pipeline.frontier(request_of)
    data = json.loads(json.dumps(found.to_json()))
    assert next(iter(data)) == "schema_version"
    again = Frontier.from_json(data, where="here")
    assert again.to_json() == found.to_json()


def test_a_pick_is_built_as_it_was_shown(request_of: ExportRequest, tmp_path: Path):
    found = pipeline.frontier(request_of)
    point = next(one for one in found.numbered[1:] if not one.is_whole)
    result = export(dataclasses.replace(request_of, pick=point.number, refit="off", out=tmp_path / "out"))
    manifest = read_manifest(tmp_path / "out")
    assert (manifest.dtype, str(manifest.shape.shape)) == (point.dtype, point.shape)
    assert manifest.latency is not None
    assert manifest.latency.measured_ms is not None
    assert manifest.latency.measured_ms["p50"] == pytest.approx(point.latency_ms, rel=0.1)
    assert manifest.latency.predicted_ms == pytest.approx(point.latency_ms, rel=1e-5)
    assert manifest.latency.full_dtype == "fp32"
    assert manifest.quality is not None
    assert manifest.quality["loss"] == pytest.approx(point.quality, abs=1e-5)
    assert [(one.dtype, one.keeps_budget) for one in manifest.reference] == [(name, None) for name in FASTER]
    assert result.settings.dtype == point.dtype


def test_a_full_model_can_be_picked(request_of: ExportRequest, tmp_path: Path):
    found = pipeline.frontier(request_of)
    point = next(one for one in found.numbered if one.is_whole and one.dtype == "int8")
    export(dataclasses.replace(request_of, pick=point.number, out=tmp_path / "out"))
    manifest = read_manifest(tmp_path / "out")
    assert (manifest.dtype, manifest.shape.shape) == ("int8", Shape(4, 1.0))


def test_a_pick_without_a_frontier_makes_one_and_says_so(request_of: ExportRequest, tmp_path: Path):
    request = dataclasses.replace(request_of, pick=1, dry_run=True, out=tmp_path / "out")
    made, found = Listener(), Listener()
    first = export(request, progress=made)
    assert "The cache has no frontier for these settings: making one." in made.notes
    again = export(request, progress=found)
    assert not any("making one" in note for note in found.notes)
    assert any(note.startswith("Number 1 of the frontier: 2x0.5 in int4, ") for note in found.notes)
    assert first.plan == again.plan
    assert first.plan.shape == Shape(2, 0.5)


@pytest.mark.parametrize("other", [{"rounding": "nearest"}, {"seed": 1}, {"refit": "fast"}])
def test_a_number_means_a_choice_of_the_same_settings(request_of: ExportRequest, other: dict[str, object]):
    """How integers are chosen, and on which samples refits are, decides losses and so the numbers."""
    request = dataclasses.replace(request_of, refit="off", pick=1, dry_run=True)
    export(request)
    listener = Listener()
    export(dataclasses.replace(request, **other), progress=listener)  # type: ignore[arg-type]
    assert "The cache has no frontier for these settings: making one." in listener.notes


def test_a_number_that_is_not_there_is_named(request_of: ExportRequest):
    count = len(pipeline.frontier(request_of).numbered)
    with pytest.raises(NothingToPick) as caught:
        export(dataclasses.replace(request_of, pick=99, dry_run=True))
    assert caught.value.what == f"The frontier has no number 99: its choices are 1 to {count}."


@pytest.mark.parametrize("more", [{"shape": "3x0.5"}, {"plan": Path("plan.json")}])
def test_a_pick_is_the_only_choice(request_of: ExportRequest, more: dict[str, object]):
    with pytest.raises((UsageError, Problems)) as caught:
        export(dataclasses.replace(request_of, pick=1, **more))
    assert "both choose the subnet" in str(caught.value)


def test_what_is_measured_is_no_prediction_any_more(request_of: ExportRequest):
    """Three are asked about; what they took is what the frontier says of them, without an error."""
    before = pipeline.frontier(request_of)
    after = pipeline.frontier(request_of, measure=3)
    measured = [point for point in after.points if point.latency_source == "measured" and not point.is_whole]
    assert len(measured) == 3
    assert all(point.latency_error == 0 for point in measured)
    at = {(point.dtype, point.shape): point.latency_ms for point in before.points}
    for point in measured:
        assert point.latency_ms == pytest.approx(at[point.dtype, point.shape], rel=0.1)


def test_an_estimate_is_not_measured(model: Path, strategy: Path):
    request = ExportRequest(model=str(model), strategy=strategy, target="jetson")
    with pytest.raises(UsageError) as caught:
        pipeline.frontier(request, measure=2)
    assert caught.value.what.startswith("--measure needs a device")


def test_the_layers_own_search_is_a_frontier_too(request_of: ExportRequest):
    found = pipeline.frontier(dataclasses.replace(request_of, policy="adaptive", dtype="fp32"))
    assert {point.dtype for point in found.points if not point.is_whole} == {"fp32"}
    assert "adaptive" in {point.policy for point in found.points}
    assert len(found.numbered) >= 3


@pytest.mark.parametrize(
    ("limit", "dtype", "is_whole"),
    [
        pytest.param({"quality": "4.0"}, "fp32", True, id="only the full model unrounded is as good"),
        pytest.param({"quality_loss": "1%"}, "int8", True, id="int8 loses a quarter of a percent"),
        pytest.param({"quality": "4.31"}, "int4", True, id="int4 whole is as good, and faster than any cut of int8"),
        pytest.param({"quality": "6"}, "int4", False, id="a cut of int4"),
    ],
)
def test_the_fastest_that_is_good_enough(
    request_of: ExportRequest, tmp_path: Path, limit: dict[str, str], dtype: str, is_whole: bool
):
    request = dataclasses.replace(request_of, refit="off", out=tmp_path / "out", **limit)
    found = pipeline.search(request)
    assert found.frontier is not None
    chosen = found.frontier.chosen
    assert chosen is not None
    assert (chosen.dtype, chosen.is_whole) == (dtype, is_whole)
    assert chosen.number is not None and chosen.fits
    (line,) = (limit for limit in found.frontier.limits if limit.quality is not None)
    assert line.quality is not None
    assert chosen.quality <= line.quality + 1e-9
    for point in found.frontier.points:
        assert point.latency_ms >= chosen.latency_ms or point.quality > line.quality, "faster, and as good"
    result = export(request)
    assert result.manifest is not None
    assert result.manifest.dtype == dtype
    assert result.manifest.quality is not None
    assert result.manifest.quality["loss"] == pytest.approx(chosen.quality, abs=1e-5)
    assert [one.dtype for one in result.manifest.reference] == list(FASTER)


@pytest.mark.parametrize(
    ("limit", "name"),
    [
        pytest.param({"quality": "4.34", "dtype": "fp32"}, "4x0.83 in fp32", id="no other precision"),
        pytest.param({"quality": "4.0", "dtype": "fp32"}, "full model in fp32", id="nor the whole model in another"),
        pytest.param({"quality": "4.36", "memory": "1.3MB"}, "4x0.83 in int8", id="int4 whole takes 1.3 MB"),
    ],
)
def test_the_fastest_is_in_a_precision_and_in_memory_that_are_allowed(
    request_of: ExportRequest, limit: dict[str, str], name: str
):
    request = dataclasses.replace(request_of, refit="off", **limit)
    found = pipeline.search(request)
    assert found.frontier is not None and found.frontier.chosen is not None
    assert found.frontier.chosen.name == name
    limit_mb = found.settings.memory_limit_mb
    assert all(one.fits <= (limit_mb is None or (one.memory_mb or 0.0) <= limit_mb) for one in found.frontier.points)


@pytest.mark.parametrize(
    ("metric", "limit", "dtype"),
    [
        ("perplexity", "500", "int4"),
        ("perplexity", "90", "int8"),
        ("accuracy", "0.6", "int8"),
        ("accuracy", "0.6", None),
    ],
)
def test_what_is_said_of_a_choice_is_what_its_artifact_says(
    request_of: ExportRequest, strategy: Path, tmp_path: Path, metric: str, limit: str, dtype: str | None
):
    """Rounding multiplies a perplexity. Of an accuracy it tells nothing, and neither is one of a rounded full model."""
    known, path = read_strategy(strategy), tmp_path / "other.safetensors"
    values = {
        shape: math.exp(loss) if metric == "perplexity" else 1 - loss / 20 for shape, loss in known.quality.items()
    }
    write_strategy(dataclasses.replace(known, quality=values, quality_metric=metric), path)
    request = dataclasses.replace(request_of, strategy=path, quality=limit, dtype=dtype, refit="off")
    result = export(dataclasses.replace(request, out=tmp_path / "out"))
    assert result.frontier is not None and result.frontier.chosen is not None
    assert result.manifest is not None and result.manifest.quality is not None
    assert not result.frontier.chosen.is_whole
    assert result.manifest.quality[metric] == pytest.approx(result.frontier.chosen.quality, rel=1e-5)


def test_a_share_of_a_quality_that_nobody_knows_is_refused(request_of: ExportRequest, strategy: Path, tmp_path: Path):
    known, path = read_strategy(strategy), tmp_path / "other.safetensors"
    values = {shape: 1 - loss / 20 for shape, loss in known.quality.items()}
    write_strategy(dataclasses.replace(known, quality=values, quality_metric="accuracy"), path)
    request = dataclasses.replace(request_of, strategy=path, quality_loss="5%", dtype="int8", refit="off")
    with pytest.raises(
        InputError, match="The accuracy of the full model in int8 is not known, and a share of it is no limit"
    ):
        pipeline.search(request)


def test_where_nothing_is_small_enough_no_larger_one_is_taken(request_of: ExportRequest, tmp_path: Path):
    with pytest.raises(NothingInMemory) as caught:
        export(dataclasses.replace(request_of, quality="6", memory="0.4MiB", refit="off", out=tmp_path / "out"))
    assert caught.value.what == "No model on the frontier is within 0.4 MiB of memory."
    assert not (tmp_path / "out").exists()


def test_where_nothing_is_good_enough_the_best_is_named(request_of: ExportRequest, tmp_path: Path):
    with pytest.raises(NothingGoodEnough) as caught:
        export(dataclasses.replace(request_of, quality="3.9", refit="off", out=tmp_path / "out"))
    assert caught.value.what == "No model reaches loss 3.9; the best, full model in fp32, has 4."
    assert caught.value.exit_code == 4
    assert not (tmp_path / "out").exists()


def test_a_latency_that_is_kept_by_what_is_too_bad_is_refused(request_of: ExportRequest, tmp_path: Path):
    request = dataclasses.replace(request_of, latency="25%", quality="4.5", refit="off", out=tmp_path / "out")
    with pytest.raises(QualityTooLow) as caught:
        export(request)
    assert caught.value.what.endswith("; the quality floor is 4.5.")
    assert not (tmp_path / "out").exists()
    assert export(dataclasses.replace(request, latency="35%")).manifest is not None


@pytest.mark.parametrize("more", [{"latency": "35%"}, {}])
def test_a_limit_that_nobody_can_check_is_refused(
    request_of: ExportRequest, strategy: Path, tmp_path: Path, more: dict[str, str]
):
    blind = tmp_path / "blind.safetensors"
    write_strategy(dataclasses.replace(read_strategy(strategy), quality={}), blind)
    with pytest.raises(InputError, match="no measured quality"):
        export(
            dataclasses.replace(request_of, strategy=blind, quality="4.5", refit="off", out=tmp_path / "out", **more)
        )
    assert not (tmp_path / "out").exists()


def test_both_spellings_of_the_limit_are_one_too_many(request_of: ExportRequest):
    with pytest.raises(UsageError, match="same limit"):
        pipeline.search(dataclasses.replace(request_of, quality="4", quality_loss="5%"))


def test_quality_is_that_of_refitted_shapes(request_of: ExportRequest, refits: list[list[Shape]]):
    """Some are refitted, in one pass, and have what was measured; the others are predicted, with an error or none."""
    found = pipeline.frontier(dataclasses.replace(request_of, refit="fast"))
    assert len(refits) == 1
    measured = {str(shape) for shape in refits[0]}
    assert 2 <= len(measured) <= 5
    cuts = [one for one in found.points if not one.is_whole]
    assert {one.quality_source for one in cuts} == {"refitted", "predicted"}
    for one in cuts:
        assert (one.quality_source == "refitted") == (one.shape in measured)
        if one.shape in measured:
            shape = Shape.parse(one.shape)
            rise = 0.9 * (4 - shape.depth) + 0.2 * (1 - shape.width)
            cut = 10 - shape.depth - 2 * shape.width - 4
            assert one.quality == pytest.approx(4 + min(rise, cut) + RISES[one.dtype], abs=0.02)
            assert one.quality_error is None
    off = pipeline.frontier(dataclasses.replace(request_of, refit="off"))
    assert len(refits) == 1
    assert {one.quality_source for one in off.points if not one.is_whole} <= {"measured", "interpolated"}


def test_a_cut_that_turns_out_worse_makes_way_for_a_slower_one(
    request_of: ExportRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The first model that is built has 0.3 nats more than was said of it."""
    values = [0.3, 0.0, 0.0]

    def figures(fitted: Fitted) -> dict[str, float] | None:
        known = quality_figures(fitted)
        return known and {**known, "loss": known["loss"] + (values.pop(0) if values else 0.0)}

    monkeypatch.setattr(goal, "quality_figures", figures)
    request = dataclasses.replace(request_of, quality="6", refit="off")
    first = pipeline.search(request)
    result = export(dataclasses.replace(request, out=tmp_path / "out"))
    assert result.frontier is not None
    assert result.frontier.chosen is not None
    assert first.frontier is not None
    assert first.frontier.chosen is not None
    assert result.frontier.chosen.quality <= 6 - (0.3 - (6 - first.frontier.chosen.quality)) + 1e-6
    assert result.frontier.chosen.latency_ms > first.frontier.chosen.latency_ms


def test_a_limit_is_not_kept_by_a_refit_that_is_not_shipped(
    request_of: ExportRequest, refits: list[list[Shape]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The quick refit that chose the cut promised as much."""
    monkeypatch.setattr(recovery, "refitted_unless_worse", lambda session, plan, recipe: (session, plan))
    request = dataclasses.replace(request_of, quality="5.2", dtype="fp32", refit="fast", heal="off")
    first = pipeline.search(request)
    assert first.frontier is not None and first.frontier.chosen is not None
    assert first.frontier.chosen.quality_source in ("refitted", "predicted")
    made = export(dataclasses.replace(request, out=tmp_path / "out"))
    shape, manifest = made.plan.shape, made.manifest
    assert made.plan.refit_id is None and manifest is not None and manifest.quality is not None
    assert manifest.quality["loss"] == pytest.approx(10 - shape.depth - 2 * shape.width, abs=0.01)
    assert manifest.quality["loss"] <= 5.2


def point(latency_ms: float, quality: float, **more: object) -> FrontierPoint:
    return FrontierPoint(dtype="fp32", shape=f"{latency_ms}", latency_ms=latency_ms, quality=quality, **more)  # type: ignore[arg-type]


def test_near_copies_share_a_number_and_the_best_of_them_has_it():
    found = numbered([point(10, 3.0), point(9.9, 3.1), point(9.0, 3.2), point(8.95, 5.0)], mode="min")
    assert [(one.latency_ms, one.number, one.on_frontier) for one in found] == [
        (8.95, 1, True),
        (9.0, None, True),
        (9.9, None, True),
        (10, 2, True),
    ]


def test_there_are_no_more_numbers_than_a_table_holds():
    many = [point(1.01**i, 100.0 - i) for i in range(300)]
    found = numbered(many, mode="min")
    numbers = [one.number for one in found if one.number]
    assert numbers == list(range(1, len(numbers) + 1))
    assert MOST_NUMBERED - 2 <= len(numbers) <= MOST_NUMBERED + 2


def test_full_models_and_what_was_chosen_always_have_a_number():
    near = [point(10, 3.0), point(9.99, 3.1, is_whole=True), point(9.98, 3.2, chosen=True)]
    assert [one.number for one in numbered(near, mode="min")] == [1, 2, 3]


def test_more_may_be_better():
    found = numbered([point(1, 0.3), point(2, 0.5), point(3, 0.4)], mode="max")
    assert [one.on_frontier for one in found] == [True, True, False]
