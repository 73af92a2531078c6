"""The choice sees what refits do: a shortlist is refitted and measured, and the others are predicted from it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from amoeba_export import ExportRequest, export
from amoeba_export.application import pipeline, prospects, recovery, selection
from amoeba_export.application.pipeline import ExportResult
from amoeba_export.application.prospects import Measured, Prospects, Searched, densified, rise_after_refit, shortlist
from amoeba_export.application.refits import heals, rise_by, rise_with
from amoeba_export.application.session import Session
from amoeba_export.calibrate import Recipe
from amoeba_export.errors import InputError
from amoeba_export.ir import Budget, DenseArchitecture, Refit, Shape, Strategy, SubnetPlan, Supernet
from amoeba_export.search import Problem, search_plan
from tests.application.test_pipeline import write_target
from tests.listener import Listener
from tests.profile.machines import SMOL
from tests.search.strategies import loss, own_strategy
from tests.tiny import save_tiny

FULL = Shape(30, 1.0)


def measured(depth: int, share: float, cut: float = 1.0, dtype: str = "fp32", width: float = 0.8) -> Measured:
    return Measured(dtype=dtype, shape=Shape(depth, width), cut=cut, rise=share * cut)


def prior() -> Strategy:
    return densified(own_strategy(quality={Shape(d, w): loss(Shape(d, w)) for d in (30, 24, 20) for w in (1.0, 0.5)}))


def test_a_depth_between_those_of_the_grid_gets_what_lies_between_them() -> None:
    made = prior()
    assert {shape.depth for shape in made.quality} == {30 - removed for removed in made.depth} >= {30, 27, 24, 20}
    low, high = made.quality[Shape(24, 0.5)], made.quality[Shape(30, 0.5)]
    assert high < made.quality[Shape(27, 0.5)] < low
    assert made.quality[FULL] == loss(FULL)


def test_a_measured_depth_has_exactly_what_was_measured() -> None:
    seen = Prospects(measured=(measured(24, 0.4), measured(20, 0.8), measured(30, 0.2)))
    made, before = seen.strategy(prior(), "fp32"), prior()
    base = before.quality[FULL]
    for depth, share in ((24, 0.4), (20, 0.8), (30, 0.2)):
        for width in (1.0, 0.5):
            cut = before.quality[Shape(depth, width)] - base
            assert made.quality[Shape(depth, width)] - base == pytest.approx(share * cut)
    assert made.depth == before.depth and made.identity == before.identity


def test_between_measured_depths_the_logarithm_of_the_share_is_linear_and_the_error_is_added() -> None:
    seen = Prospects(measured=(measured(20, 0.8), measured(24, 0.4), measured(28, 0.2)))
    assert seen.error == pytest.approx((0.4 + 0.0 + 0.2) / 3), "from the others: 0.4, 0.4 and 0.4"
    assert seen.loss("fp32", 22, 1.0) == pytest.approx((0.8 * 0.4) ** 0.5 + 0.2)
    assert seen.loss("fp32", 30, 2.0) == pytest.approx(2 * 0.2 + 0.2)
    assert seen.loss("fp32", 22, 0.1) == 0.1, "no refit is thought to do harm"


def test_too_few_refits_predict_nothing() -> None:
    seen = Prospects(measured=(measured(24, 0.4), measured(24, 0.5, dtype="int4", width=0.9)))
    assert seen.error is None
    assert seen.loss("fp32", 20, 1.0) == 1.0
    assert seen.loss("fp32", 24, 1.0) == pytest.approx(0.4)
    assert seen.loss("int4", 24, 1.0) == pytest.approx(0.5)
    assert seen.loss("int8", 24, 1.0) == pytest.approx(0.4), "the nearest of any precision"


def test_a_perplexity_is_scaled_as_a_loss() -> None:
    base = dataclasses.replace(own_strategy(quality={FULL: 10.0, Shape(20, 1.0): 1000.0}), quality_metric="perplexity")
    made = Prospects(measured=(measured(20, 0.5),)).strategy(base, "fp32")
    assert made.quality[Shape(20, 1.0)] == pytest.approx(100.0)
    assert made.quality[FULL] == pytest.approx(10.0)


class Weighing:
    """Time grows with the weights."""

    def predict(self, dense: DenseArchitecture, metric: str = "decode", percentile: int = 50) -> tuple[float, float]:
        return 1 + sum(0.05 + 1e-7 * dense.base.prunable_params(layer) for layer in dense.layers), 0.0


def searched(latency: str, dtype: str = "fp32", rise: float = 0.0) -> Searched:
    strategy = densified(own_strategy(quality={Shape(d, w): loss(Shape(d, w)) for d in (30, 27, 24, 20) for w in W}))
    result = search_plan(Problem(strategy=strategy, architecture=SMOL, budgets=(Budget.parse(latency),)), Weighing())
    return Searched(dtype=dtype, rise=rise, search=result)


W = (1.0, 0.875, 0.75, 0.5)


def test_a_shortlist_has_distinct_depths_on_the_budget_line_and_the_best_cut() -> None:
    option = searched("60%")
    chosen = [candidate for _, candidate in shortlist([option], loss(FULL), to_beat=None)]
    depths = [candidate.shape.depth for candidate in chosen]
    assert len(set(depths)) == len(depths) >= 3
    assert option.search.best in chosen
    for candidate in chosen:
        same = [one for one in option.search.candidates if one.fits and one.shape.depth == candidate.shape.depth]
        assert candidate.shape.width == max(one.shape.width for one in same)


def test_nothing_is_listed_where_the_whole_model_wins_clearly() -> None:
    option = searched("60%")
    least = min(one.quality.value for one in option.search.candidates if one.fits) - loss(FULL)
    assert shortlist([option], loss(FULL), to_beat=loss(FULL) + 0.9 * prospects.BEST_SHARE * least) == []
    assert shortlist([option], loss(FULL), to_beat=loss(FULL) + 1.5 * prospects.BEST_SHARE * least) != []


@pytest.fixture
def refits(monkeypatch: pytest.MonkeyPatch) -> list[list[Shape]]:
    """Refits as a rule: they leave nearly all of what a lost layer costs, and a tenth of what width costs."""
    asked: list[list[Shape]] = []

    def refitted(session: Session, plans: Sequence[SubnetPlan], recipe: str) -> tuple[Session, list[SubnetPlan]]:
        asked.append([plan.shape for plan in plans])
        held = {}
        for plan in plans:
            rise = 0.9 * (4 - plan.shape.depth) + 0.2 * (1 - plan.shape.width)
            losses = {text: {"full": full, "cut": 9.0, "refit": full + rise} for text, full in (("a", 3.0), ("b", 2.0))}
            held[plan.geometry] = Refit(
                tensors=session.supernet.tensors,
                geometry=plan.geometry,
                model_id="",
                losses=losses,
                identity=plan.geometry,
            )
        supernet = dataclasses.replace(session.supernet, refits=held)
        return session.with_supernet(supernet), [dataclasses.replace(one, refit_id=one.geometry) for one in plans]

    monkeypatch.setattr(prospects, "refitted", refitted)
    return asked


@pytest.fixture
def request_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., ExportRequest]:
    """Of a search where a layer seems to cost 1 and all of the width 6."""
    from amoeba_export import backends

    def calibrate(supernet: Supernet, recipe: Recipe, **settings: object) -> Strategy:
        quality = {Shape(d, w): 3 + 1.0 * (4 - d) + 6 * (1 - w) for d in (4, 3, 2) for w in recipe.quality.widths}
        made = own_strategy(supernet.architecture, depths=(4, 3, 2), widths=recipe.quality.widths, quality=quality)
        return dataclasses.replace(made, model_id=supernet.identity)

    monkeypatch.setattr(selection, "calibrate", calibrate)
    monkeypatch.setattr(backends, "BACKENDS", {**backends.BACKENDS, "imaginary": "tests.imaginary:BACKEND"})
    monkeypatch.setenv("AMOEBA_CACHE", str(tmp_path / "cache"))
    model = save_tiny(tmp_path / "model")

    def made(latency: str, refit: str, **dtypes: float) -> ExportRequest:
        target = write_target(tmp_path, dtypes=dtypes or {"fp32": 1.0})
        return ExportRequest(model=str(model), target=str(target), latency=latency, refit=refit)

    return made


@pytest.fixture
def search(request_of: Callable[..., ExportRequest]) -> Callable[..., tuple[ExportResult, Listener]]:
    def run(latency: str, refit: str, **dtypes: float) -> tuple[ExportResult, Listener]:
        listener = Listener()
        return pipeline.search(request_of(latency, refit, **dtypes), progress=listener), listener

    return run


def test_the_choice_is_the_best_refitted_shape_and_not_the_best_cut(
    search: Callable[..., tuple[ExportResult, Listener]], refits: list[list[Shape]]
) -> None:
    as_cut, _ = search("70%", "off")
    assert as_cut.plan.shape.depth < 4 and refits == []
    found, listener = search("70%", "fast")
    assert len(refits) == 1 and as_cut.plan.shape in refits[0], "the best cut is compared, too"
    assert found.plan.shape.depth == 4 and found.plan.shape.width < 0.8
    assert found.search is not None and found.search.best.quality.source == "refitted"
    assert found.search.best.quality.value == pytest.approx(3 + 0.2 * (1 - found.plan.shape.width), abs=1e-6)
    assert any(note.startswith("A refit changes which shape is best") for note in listener.notes)


def test_a_choice_expects_of_a_heal_what_it_usually_recovers(
    search: Callable[..., tuple[ExportResult, Listener]], refits: list[list[Shape]]
) -> None:
    """The recipe `full` heals, and `fast` does not."""
    found, listener = search("70%", "full")
    rise = prospects.HEAL_SHARE * 0.2 * (1 - found.plan.shape.width)
    assert found.search is not None and found.search.best.quality.source == "refitted"
    assert found.search.best.quality.value == pytest.approx(3 + rise, abs=1e-6)
    assert "A heal is expected to leave 0.7 of these rises." in listener.notes


@pytest.mark.parametrize(
    ("params", "experts", "asked", "is_healed"),
    [
        pytest.param(1e8, False, None, True, id="small"),
        pytest.param(7e9, False, None, False, id="large"),
        pytest.param(7e9, False, "20m", True, id="large, and asked for"),
        pytest.param(1e8, True, "20m", False, id="experts are not healed"),
    ],
)
def test_what_is_healed(params: float, experts: bool, asked: str | None, is_healed: bool) -> None:
    settings = SimpleNamespace(heal=object(), request=SimpleNamespace(heal=asked))
    size, architecture = SimpleNamespace(num_params=params), SimpleNamespace(expert_size=64 if experts else None)
    session: Any = SimpleNamespace(settings=settings, full=size, architecture=architecture)
    assert heals(session) == is_healed
    settings.heal = None
    assert not heals(session)


def test_a_shape_whose_refit_is_not_shipped_is_worth_what_it_is_as_it_was_cut(
    request_of: Callable[..., ExportRequest],
    refits: list[list[Shape]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The quick refit that chose it promised more."""
    monkeypatch.setattr(recovery, "refitted_unless_worse", lambda session, plan, recipe: (session, plan))
    made = export(dataclasses.replace(request_of("70%", "fast"), heal="off", out=tmp_path / "out"))
    assert made.search is not None and made.search.best.quality.source in ("refitted", "predicted")
    assert made.plan.refit_id is None and made.manifest is not None and made.manifest.quality is not None
    shape = made.plan.shape
    assert made.manifest.quality["loss"] == pytest.approx(3 + (4 - shape.depth) + 6 * (1 - shape.width), abs=0.05)


def test_a_refit_that_is_shipped_all_the_same_counts_as_it_is() -> None:
    """A given file may hold one that is worse than the cut: a shortlist would not ship it, this artifact does."""
    losses = {"a": {"full": 3.0, "cut": 3.5, "refit": 3.75}, "b": {"full": 2.0, "cut": 2.5, "refit": 2.75}}
    held = Refit(tensors=None, geometry="", model_id="", losses=losses, identity="")  # type: ignore[arg-type]
    assert (rise_with(held), rise_by(held), rise_after_refit(held)) == (0.75, 0.25, 0.5)


def test_where_the_whole_model_in_a_coarser_precision_wins_nothing_is_refitted(
    search: Callable[..., tuple[ExportResult, Listener]], refits: list[list[Shape]]
) -> None:
    found, _ = search("70%", "fast", fp32=1.0, int8=0.5)
    assert found.plan.shape == Shape(4, 1.0) and refits == []


def test_texts_that_cannot_be_used_leave_the_choice_to_the_cuts(
    search: Callable[..., tuple[ExportResult, Listener]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refitted(*_: object) -> None:
        raise InputError("The model has no tokenizer.")

    as_cut, _ = search("70%", "off")
    monkeypatch.setattr(prospects, "refitted", refitted)
    found, listener = search("70%", "fast")
    assert found.plan == as_cut.plan
    assert "Shapes are compared without a refit: The model has no tokenizer." in listener.notes
